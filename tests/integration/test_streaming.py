"""Rounds that keep no update: the same state to the last bit, whatever the order of the answers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from flwr.app import Message

from giva_core.config import RunConfig
from giva_core.types import Arrays
from server import rounds
from server.local_grid import LocalGrid
from server.run_store import RunStore
from server.simulate import simulate


def state_of(store: RunStore, run_id: str) -> Arrays:
    stored = store.last_state(run_id)
    assert stored is not None
    return stored.arrays


@pytest.mark.parametrize("settings", [{}, {"rounds__mode": "alternate"}, {"wire__precision": "int8"}])
def test_a_sum_on_the_way_gives_the_same_bytes_in_any_order(
    toy_config: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    config = toy_config.replace(rounds__num_rounds=2, **settings)
    kept = simulate(config, store)
    monkeypatch.setattr(rounds, "KEPT_UPDATES", 1)
    pull = LocalGrid.pull_messages

    def last_first(self: LocalGrid, message_ids: Iterable[str]) -> Iterable[Message]:
        return pull(self, list(message_ids)[::-1])

    monkeypatch.setattr(LocalGrid, "pull_messages", last_first)
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
