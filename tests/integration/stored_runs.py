"""What a run left in its store, and runs that die."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from giva_core.config import RunConfig
from giva_core.types import Arrays, RoundRecord
from server.run_store import RunStore
from server.simulate import simulate


def state_of(store: RunStore, run_id: str) -> Arrays:
    """The last state, with what the server keeps beside it."""
    stored = store.last_state(run_id)
    assert stored is not None
    return {**stored.arrays, **stored.extra}


def same_bytes(first: Arrays, second: Arrays) -> bool:
    """Whether both have the same arrays to the bit."""
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


class _Killed(BaseException):
    """No error that anything handles."""


def killed_run(config: RunConfig, store: RunStore, is_last: Callable[[RoundRecord], bool]) -> str:
    """The id of a run that died right after a record."""

    def watch(record: RoundRecord) -> None:
        if is_last(record):
            raise _Killed

    with pytest.raises(_Killed):
        simulate(config, store, watch)
    return store.run("last").run_id


def run_killed_before(config: RunConfig, store: RunStore, phase: str, number: int) -> str:
    """The id of a run that died when it was about to record this phase and round."""
    record = RunStore.record

    def dying(self: RunStore, run_id: str, what: RoundRecord, *state: Any) -> None:
        if (what.phase, what.round) == (phase, number):
            raise _Killed
        record(self, run_id, what, *state)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(RunStore, "record", dying)
        simulate(config, store)
    return store.run("last").run_id
