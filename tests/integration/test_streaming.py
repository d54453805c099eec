"""Rounds that keep no update, and passes that keep no sketch: the same bytes, whatever the order of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from stored_runs import run_killed_before, state_of

from giva_core.config import RunConfig
from server import agreement, rounds
from server.local_grid import LocalGrid
from server.run_store import RunStore
from server.simulate import resume, simulate
from server.sketch_shelf import SketchShelf


@pytest.fixture
def last_first(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the sites answer in reverse order from then on."""
    pull = LocalGrid.pull_messages

    def reversed_pull(self: LocalGrid, message_ids: Iterable[str]) -> Iterable[Message]:
        return pull(self, list(message_ids)[::-1])

    return lambda: monkeypatch.setattr(LocalGrid, "pull_messages", reversed_pull)


@pytest.mark.parametrize("settings", [{}, {"rounds__mode": "alternate"}, {"wire__precision": "int8"}])
def test_a_sum_on_the_way_gives_the_same_bytes_in_any_order(
    toy_config: RunConfig,
    store: RunStore,
    monkeypatch: pytest.MonkeyPatch,
    last_first: Callable[[], None],
    settings: dict[str, str],
) -> None:
    config = toy_config.replace(rounds__num_rounds=2, **settings)
    kept = simulate(config, store)
    monkeypatch.setattr(rounds, "KEPT_UPDATES", 1)
    last_first()
    summed = simulate(config, store)
    wanted, found = state_of(store, kept), state_of(store, summed)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    before, after = store.rounds(kept, "train"), store.rounds(summed, "train")
    assert [record.metrics for record in after] == [record.metrics for record in before]
    assert [record.train_loss for record in after] == [record.train_loss for record in before]
    assert before[0].aggregation_error is not None and after[0].aggregation_error is None


@pytest.mark.parametrize("settings", [{"rounds__mode": "exact"}, {"strategy__name": "fedmedian"}])
def test_what_needs_every_update_keeps_them(
    toy_config: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    monkeypatch.setattr(rounds, "KEPT_UPDATES", 1)
    run_id = simulate(toy_config.replace(rounds__num_rounds=1, **settings), store)
    assert store.rounds(run_id, "train")[0].aggregation_error is not None


def test_no_update_is_kept_where_no_error_is_told(
    toy_config: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[str, bool]] = []
    decide = rounds.Federation._keeps_updates

    def noting(self: rounds.Federation, plan: rounds.Plan, sites: int) -> bool:
        kept.append((plan.phase, decide(self, plan, sites)))
        return kept[-1][1]

    monkeypatch.setattr(rounds.Federation, "_keeps_updates", noting)
    once = toy_config.replace(rounds__num_rounds=1, rounds__head_rounds=1)
    simulate(once, store)
    simulate(once.replace(method="full", rounds__head_rounds=0), store)
    assert kept == [("head", False), ("train", True), ("train", False)]


# -- calibration ------------------------------------------------------------------------------------------------------


def files_of(store: RunStore, run_id: str) -> list[Path]:
    return sorted(store.run_folder(run_id).iterdir())


def test_sketches_in_a_file_give_the_same_bases_in_any_order_and_after_a_kill(
    toy_config: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch, last_first: Callable[[], None]
) -> None:
    config = toy_config.replace(rounds__num_rounds=1, rounds__head_rounds=1, giva__init="topsv", giva__rank=3)
    kept = simulate(config, store)
    written: list[int] = []
    close = SketchShelf.__exit__

    def noting(self: SketchShelf, *error: Any) -> None:
        written.append(self.written_bytes)
        close(self, *error)

    monkeypatch.setattr(SketchShelf, "__exit__", noting)
    monkeypatch.setattr(agreement, "KEPT_SKETCH_BYTES", 1)
    last_first()
    killed = run_killed_before(config, store, "calibrate", 3)
    assert [file.name for file in files_of(store, killed)] == ["head-0001.safetensors", "lock"]
    resume(killed, store)
    assert len(written) == 3 + 4 and min(written) > 0
    assert store.load_blob(killed, "sketches").keys() == store.load_blob(kept, "sketches").keys()
    for name, array in store.load_blob(kept, "sketches").items():
        assert store.load_blob(killed, "sketches")[name].tobytes() == array.tobytes()
    assert store.run(killed).facts == store.run(kept).facts
    assert [file.name for file in files_of(store, killed)] == [file.name for file in files_of(store, kept)]
    of = [[(r.total_examples, r.train_loss) for r in store.rounds(run_id, "calibrate")] for run_id in (kept, killed)]
    assert of[0] == of[1]
