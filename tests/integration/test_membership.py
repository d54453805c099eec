"""Sites that leave, come back, join late, fall silent or lose their bases, while a run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping

import pytest
from flwr.app import Context, Error, Message

from client import backbone, trainer
from client.app import app
from giva_core.config import RunConfig
from giva_core.paths import giva_home
from giva_core.types import RoundRecord
from server import exchange
from server.local_grid import LocalGrid
from server.rounds import Federation
from server.run_store import RunStore

NODES = {1001: 0, 1002: 1, 1003: 2}  # partition by node id


class ChangingGrid(LocalGrid):
    """A grid that nodes join and leave between rounds, and some of whose nodes do not answer."""

    def __init__(self, config: RunConfig, nodes: Mapping[int, int], answer: Callable = app) -> None:
        super().__init__(answer, {}, config.to_flat())
        self._config = config
        self.silent: set[int] = set()
        self.asked: dict[str, Message] = {}
        for node_id, partition in nodes.items():
            self.join(node_id, partition)

    def join(self, node_id: int, partition: int) -> None:
        own = {"partition-id": partition, "num-partitions": len(NODES)}
        self._contexts.update(LocalGrid(app, {node_id: own}, self._config.to_flat())._contexts)

    def leave(self, node_id: int) -> None:
        del self._contexts[node_id]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        self.asked.update(zip(ids, messages, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        heard = (i for i in message_ids if self.asked[i].metadata.dst_node_id not in self.silent)
        return super().pull_messages(heard)


def federate(store: RunStore, grid: ChangingGrid, config: RunConfig, change: Callable[[str, int], object]) -> str:
    """Run a federation on this grid; `change` is told each finished head or training round."""
    run_id = store.create_run(config, "test", {})

    def watch(record: RoundRecord) -> None:
        if record.phase in ("head", "train") and record.eval_loss is None:
            change(record.phase, record.round)

    Federation(grid, config, store, run_id, watch).run()
    return run_id


def statuses(record: RoundRecord) -> dict[str, str]:
    return {site.site: site.status for site in record.sites}


ALL = dict.fromkeys(("site-1", "site-2", "site-3"), "ok")


def test_a_site_leaves_and_comes_back_as_another_node(toy_config: RunConfig, store: RunStore) -> None:
    config = toy_config.replace(rounds__min_sites=2, rounds__num_rounds=3)
    grid = ChangingGrid(config, NODES)
    changes = {("train", 1): lambda: grid.leave(1002), ("train", 2): lambda: grid.join(2002, 1)}
    run_id = federate(store, grid, config, lambda *when: changes.get(when, lambda: None)())
    first, second, third = store.rounds(run_id, "train")
    assert statuses(first) == statuses(third) == ALL
    # the newcomer has not trained in the second round, but evaluates its state when it gets that to train from
    assert {site.site for site in second.sites if site.num_steps} == {"site-1", "site-3"}
    assert all(site.eval_examples for site in second.sites)
    late = {phase: store.rounds(run_id, phase)[1:] for phase in ("hello", "bases")}
    assert [[statuses(record) for record in records] for records in late.values()] == [[{"site-2": "ok"}]] * 2
    assert all(record.bytes_up > 0 and record.bytes_down > 0 for records in late.values() for record in records)
    assert store.run(run_id).status == "completed"


def test_a_new_site_joins_late_and_one_is_turned_away(toy_config: RunConfig, store: RunStore) -> None:
    config = toy_config.replace(rounds__min_sites=2, rounds__num_rounds=2)
    grid = ChangingGrid(config, {1001: 0, 1002: 1})

    def change(phase: str, number: int) -> None:
        if (phase, number) == ("train", 1):
            grid.join(1003, 2)
            grid.join(2001, 0)  # a second site-1

    run_id = federate(store, grid, config, change)
    first, second = store.rounds(run_id, "train")
    assert {site.site for site in first.sites if site.num_steps} == {"site-1", "site-2"}
    assert statuses(second) == ALL
    assert statuses(store.rounds(run_id, "hello")[1]) == {"site-3": "ok", "site-1-2001": "refused"}
    assert statuses(store.rounds(run_id, "bases")[1]) == {"site-3": "ok"}


def test_a_site_that_lost_its_bases_gets_them_again(toy_config: RunConfig, store: RunStore) -> None:
    config = toy_config.replace(rounds__num_rounds=3, rounds__evaluate_every=9)

    def forgetful(message: Message, context: Context) -> Message:
        if context.node_id == 1003 and (message.metadata.message_type, message.metadata.group_id) == (
            "train.round",
            "train-2",
        ):
            trainer.drop_trainers()
            backbone.drop_backbones()
            shutil.rmtree(giva_home() / "cache" / "bases")
        return app(message, context)

    run_id = federate(store, ChangingGrid(config, NODES, forgetful), config, lambda *when: None)
    first, second, third = store.rounds(run_id, "train")
    assert statuses(first) == statuses(third) == ALL
    assert statuses(second) == {**ALL, "site-3": "failed"}
    assert second.sites[2].reason.startswith("bases: ")
    assert statuses(store.rounds(run_id, "bases")[1]) == {"site-3": "ok"}


def test_a_site_whose_update_failed_evaluates_in_the_second_attempt(toy_config: RunConfig, store: RunStore) -> None:
    config = toy_config.replace(rounds__quorum=3, rounds__num_rounds=2)
    failed: set[int] = set()

    def failing_once(message: Message, context: Context) -> Message:
        is_second = (message.metadata.message_type, message.metadata.group_id) == ("train.round", "train-2")
        if is_second and context.node_id in (1002, 1003) and context.node_id not in failed:
            failed.add(context.node_id)
            return Message(Error(100, "data: just now"), reply_to=message)
        return app(message, context)

    first, _ = store.rounds(
        federate(store, ChangingGrid(config, NODES, failing_once), config, lambda *_: None), "train"
    )
    assert failed == {1002, 1003} and all(site.eval_loss is not None for site in first.sites)
    whole, _ = store.rounds(federate(store, ChangingGrid(config, NODES), config, lambda *_: None), "train")
    assert first.eval_loss == whole.eval_loss and first.metrics == whole.metrics


def test_a_site_may_leave_between_its_evaluation_and_the_end_of_the_round(
    toy_config: RunConfig, store: RunStore
) -> None:
    config = toy_config.replace(rounds__min_sites=2, rounds__quorum=2, rounds__num_rounds=2)
    seen: list[int] = []

    def leaving(message: Message, context: Context) -> Message:
        if (message.metadata.message_type, message.metadata.group_id) != ("train.round", "train-2"):
            return app(message, context)
        seen.append(context.node_id)
        if context.node_id != 1001 and seen.count(context.node_id) == 1:
            return Message(Error(100, "data: just now"), reply_to=message)
        return app(message, context)

    grid = ChangingGrid(config, NODES, leaving)
    ids = grid.get_node_ids
    grid.get_node_ids = lambda: [n for n in ids() if n != 1001 or len(seen) < 3]  # type: ignore[method-assign]
    run_id = federate(store, grid, config, lambda *_: None)
    first, second = store.rounds(run_id, "train")
    assert store.run(run_id).status == "completed" and all(site.eval_loss is not None for site in first.sites)
    assert {site.site for site in second.sites if site.num_steps} == {"site-2", "site-3"}


def test_a_silent_site_is_benched_and_heard_again(
    toy_config: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.0)
    config = toy_config.replace(
        rounds__min_sites=2, rounds__num_rounds=7, rounds__evaluate_every=9, rounds__deadline_seconds=2.0
    )
    grid = ChangingGrid(config, NODES)
    changes = {("train", 1): lambda: grid.silent.add(1003), ("train", 3): lambda: grid.silent.clear()}
    run_id = federate(store, grid, config, lambda *when: changes.get(when, lambda: None)())
    records = [next(site for site in record.sites if site.site == "site-3") for record in store.rounds(run_id, "train")]
    assert [record.status for record in records] == ["ok", *["missing"] * 5, "ok"]
    assert [record.bytes_down > 0 for record in records] == [True, True, True, False, False, False, True]
    assert "not asked: it missed 2 deadlines in a row" in records[3].reason
