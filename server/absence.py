"""Patience with those who do not answer: silent nodes are asked ever more rarely, silent sites sit out some rounds.

Without it one node that hangs costs every round its whole deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from giva_core.types import SiteRecord

from .exchange import Answer

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60.0, 3600.0
MISSES_TO_BENCH = 2
BENCH_ROUNDS = 3


@dataclass
class BackOff:
    """When a node that did not introduce itself is asked again: after a minute, then two, four, ... up to an hour.

    Attributes:
        clock: Seconds that only grow.
    """

    clock: Callable[[], float] = time.monotonic
    _pauses: dict[int, tuple[float, float]] = field(default_factory=dict)  # node id → length of the pause, its end

    def missed(self, node_id: int) -> None:
        """The node did not answer: begin its next pause, twice as long as the one before."""
        last, _ = self._pauses.get(node_id, (FIRST_PAUSE_SECONDS / 2, 0.0))
        pause = min(2 * last, LONGEST_PAUSE_SECONDS)
        self._pauses[node_id] = pause, self.clock() + pause

    def answered(self, node_id: int) -> None:
        """The node answered: forget its pauses."""
        self._pauses.pop(node_id, None)

    def resting(self) -> set[int]:
        """The nodes that are not to be asked now."""
        now = self.clock()
        return {node_id for node_id, (_, end) in self._pauses.items() if now < end}


@dataclass
class Bench:
    """Sites that missed two deadlines in a row: they sit out the next three rounds, unless too few others are left."""

    _misses: dict[str, int] = field(default_factory=dict)
    _rounds_left: dict[str, int] = field(default_factory=dict)

    def note(self, answers: Sequence[Answer]) -> None:
        """Take note of who answered and who did not."""
        for answer in answers:
            if answer.status != "missing":
                self.clear(answer.site)
                continue
            self._misses[answer.site] = self._misses.get(answer.site, 0) + 1
            if self._misses[answer.site] >= MISSES_TO_BENCH:
                self._rounds_left[answer.site] = BENCH_ROUNDS + 1  # the round that goes on now does not count

    def clear(self, site: str) -> None:
        """The site has been heard of: it is asked like any other."""
        self._misses.pop(site, None)
        self._rounds_left.pop(site, None)

    def next_round(self) -> None:
        """A round begins: who has sat out long enough is asked again, once; another miss benches it anew."""
        self._rounds_left = {site: left - 1 for site, left in self._rounds_left.items() if left > 1}

    def __contains__(self, site: object) -> bool:
        return site in self._rounds_left

    def records(self, asked: Collection[str]) -> list[SiteRecord]:
        """A record for every benched site that is not among those `asked`."""
        return [
            SiteRecord(
                site, "missing", f"not asked: it missed {MISSES_TO_BENCH} deadlines in a row; {left} rounds left"
            )
            for site, left in sorted(self._rounds_left.items())
            if site not in asked
        ]
