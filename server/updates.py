"""The server's side of a training answer: what is let in, and what becomes of a round that took several attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from giva_core import protocol
from giva_core.errors import GivaError
from giva_core.protocol import Hello
from giva_core.running_mean import RunningMean
from giva_core.types import Arrays, ClientUpdate, SiteRecord
from giva_core.wire import PLAIN, Coding

from .exchange import Answer, site_record
from .guard import check_update


@dataclass(frozen=True)
class Accepted:
    """What came of asking sites to train.

    Attributes:
        updates: Those that passed the guard, in the order of the sites' names; without their arrays where these went
            into `mean`.
        records: One for every sampled site.
        mean: The weighted mean of what was trained, where the updates were not kept.
    """

    updates: list[ClientUpdate]
    records: list[SiteRecord]
    mean: Arrays | None = None


@dataclass
class Intake:
    """Takes the answers to a training request as they come: each is checked, and what counts is summed up or kept.

    Attributes:
        hellos: What the sites said of themselves.
        start: The global arrays they started from.
        names: Which of these they trained, in wire order.
        bases_digest: The run's bases; empty where there are none.
        max_norm: Largest change of all arrays; 0 for no limit.
        keeps: Whether every update is kept; else memory does not grow with the number of sites.
        coding: How numbers travel; differences are added to `start`, whatever the sites got of it.
        sent_digest: Digest of what the sites got, where that was rounded.
    """

    hellos: Mapping[str, Hello]
    start: Arrays
    names: Sequence[str]
    bases_digest: str = ""
    max_norm: float = 0.0
    keeps: bool = True
    coding: Coding = PLAIN
    sent_digest: str = ""
    _taken: dict[str, ClientUpdate] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _running: RunningMean = field(default_factory=RunningMean)

    def take(self, answer: Answer) -> Answer:
        """Read an answer; returns it without the update."""
        if answer.payload is None:
            return answer
        shapes = {name: self.start[name].shape for name in self.names}
        try:
            update = protocol.update_from_payload(answer.payload, shapes, self.coding, self.start, self.sent_digest)
            check_update(update, self.hellos[answer.site], self.start, self.bases_digest, self.max_norm)
            if not self.keeps:
                self._running.add(update.arrays, update.num_examples)
                update = replace(update, arrays={})
            self._taken[answer.site] = update
        except GivaError as error:
            self._refused[answer.site] = str(error)
        return replace(answer, payload=protocol.without_update(answer.payload))

    def accepted(self, answers: Sequence[Answer]) -> Accepted:
        """What counts, once all answers are in; they were all taken."""
        records = [self._record(answer) for answer in answers]
        updates = [self._taken[site] for site in sorted(self._taken)]
        return Accepted(updates, records, None if self.keeps or not updates else self._running.mean())

    def _record(self, answer: Answer) -> SiteRecord:
        record = site_record(answer)
        if (reason := self._refused.get(answer.site)) is not None:
            return replace(record, status="refused", reason=reason)
        if (update := self._taken.get(answer.site)) is None:
            return record
        return replace(
            record,
            num_examples=update.num_examples,
            num_steps=update.num_steps,
            train_loss=update.train_loss,
            train_seconds=update.seconds,
        )


def merge_attempts(earlier: Sequence[SiteRecord], later: Sequence[SiteRecord]) -> list[SiteRecord]:
    """One record for each site: the later attempt's outcome, with the bytes of both.

    An update of an earlier attempt was thrown away with it, so its site counts only where it came again.
    """
    merged = {record.site: _uncounted(record) for record in earlier}
    for record in later:
        if (before := merged.get(record.site)) is not None:
            record = replace(
                record, bytes_up=record.bytes_up + before.bytes_up, bytes_down=record.bytes_down + before.bytes_down
            )
        merged[record.site] = record
    return sorted(merged.values(), key=lambda record: record.site)


def _uncounted(record: SiteRecord) -> SiteRecord:
    if record.status != "ok":
        return record
    return SiteRecord(
        record.site, "failed", "attempt without quorum", bytes_up=record.bytes_up, bytes_down=record.bytes_down
    )
