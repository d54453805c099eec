"""Times of pieces of work that take turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Work = Callable[[], object]


def wall_seconds(run: Work) -> float:
    """Seconds that `run` takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turn(
    work: Mapping[str, Work], repeats: int, seconds_of: Callable[[Work], float] = wall_seconds
) -> dict[str, list[float]]:
    """Seconds of each; one warm-up, then all in turn, `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(repeats + 1):
        for name, run in work.items():
            taken = seconds_of(run)
            if number:
                seconds[name].append(taken)
    return seconds
