"""Federations whose numbers travel in two bytes or one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stored_runs import killed_run, same_bytes, state_of

from giva_core.config import RunConfig
from giva_core.types import RoundRecord
from server.run_store import RunStore
from server.simulate import resume, simulate

ENVELOPE = 3000


@pytest.mark.parametrize(("precision", "size"), [("float16", 2), ("int8", 1)])
@pytest.mark.parametrize("method", ["giva", "rolora"])
def test_fewer_bytes_nearly_the_same_result_and_a_resume_to_the_same_bytes(
    toy_config: RunConfig, store: RunStore, precision: str, size: int, method: str
) -> None:
    config = toy_config.replace(method=method, lora__rank=30, wire__precision=precision, train__learning_rate=0.01)
    if method == "rolora":
        pytest.importorskip("peft")
        config = config.replace(lora__rank=12)
    plain = simulate(config.replace(wire__precision="float32"), store)
    run_id = simulate(config, store)
    state, wanted = state_of(store, run_id), state_of(store, plain)
    for name, array in wanted.items():
        assert np.linalg.norm(state[name] - array) <= 0.2 * max(0.05, np.linalg.norm(array)), name
    assert any(not np.array_equal(state[name], array) for name, array in wanted.items())
    numbers = sum(array.size for array in wanted.values())
    *inner, _ = store.rounds(run_id, "train")
    for site in inner[0].sites:
        assert size * numbers <= site.bytes_down <= size * numbers + 4 * len(wanted) + ENVELOPE
        if method == "giva":
            assert size * numbers <= site.bytes_up <= size * numbers + 4 * len(wanted) + ENVELOPE

    def is_the_second(record: RoundRecord) -> bool:
        return (record.phase, record.round) == ("train", 2) and record.eval_loss is None

    stopped = killed_run(config, store, is_the_second)
    resume(stopped, store)
    assert same_bytes(state_of(store, stopped), state)


def test_an_emptied_cache_loses_a_rounding_error_and_no_run(
    toy_config: RunConfig, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config.replace(wire__precision="int8")
    stopped = killed_run(config, store, lambda record: record.phase == "train")
    monkeypatch.setenv("GIVA_HOME", str(tmp_path / "empty"))
    resume(stopped, store)
    assert store.run(stopped).status == "completed"
