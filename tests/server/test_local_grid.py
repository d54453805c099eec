"""The grid in one process: real messages, contexts that last, errors that stay with their node."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from server.local_grid import LocalGrid

NODES = {5: {"partition-id": 0}, 7: {"partition-id": 1}}


def content(value: float = 1.0) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"x": Array(np.full(3, value))}), "values": ConfigRecord({"n": 2})})


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def messages(grid: LocalGrid) -> list[Message]:
    return [grid.create_message(content(node_id), "train.round", node_id, "3", ttl=9.0) for node_id in NODES]


def test_is_a_grid_of_flower_s() -> None:
    grid = LocalGrid(echo, NODES, {})
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [5, 7]
    assert [node.node_id for node in grid.get_nodes()] == [5, 7]
    assert grid.run.run_id == 1
    run = Run.create_empty(8)
    grid.set_run(run)
    assert grid.run is run


def test_each_reply_answers_its_question() -> None:
    grid = LocalGrid(echo, NODES, {})
    ids = list(grid.push_messages(messages(grid)))
    assert len(set(ids)) == 2
    replies = list(grid.pull_messages(reversed(ids)))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids[::-1]
    assert [reply.metadata.src_node_id for reply in replies] == [7, 5]
    arrays = [reply.content.array_records["arrays"]["x"].numpy() for reply in replies]
    assert [array.tolist() for array in arrays] == [[7.0] * 3, [5.0] * 3]


def test_replies_are_pulled_once() -> None:
    grid = LocalGrid(echo, NODES, {})
    ids = list(grid.push_messages(messages(grid)))
    assert len(list(grid.pull_messages(ids))) == 2
    assert list(grid.pull_messages([*ids, "unknown"])) == []


def test_messages_are_copies_on_both_ways() -> None:
    seen: list[Message] = []

    def keep(message: Message, context: Context) -> Message:
        seen.append(message)
        return Message(message.content, reply_to=message)

    grid = LocalGrid(keep, NODES, {})
    [sent, _] = messages(grid)
    [reply] = grid.send_and_receive([sent])
    assert seen[0].content is not sent.content and reply.content is not seen[0].content
    assert seen[0].metadata.message_type == "train.round" and seen[0].metadata.group_id == "3"
    sent.content.config_records["values"]["n"] = 99
    assert reply.content.config_records["values"]["n"] == seen[0].content.config_records["values"]["n"] == 2


def test_contexts_are_each_node_s_own_and_last() -> None:
    def count(message: Message, context: Context) -> Message:
        before = context.state.config_records.get("c", ConfigRecord({"n": 0}))["n"]
        context.state["c"] = ConfigRecord({"n": before + 1})  # type: ignore[operator]
        partition = context.node_config["partition-id"]
        answer = ConfigRecord({"seen": before, "partition": partition, "rank": context.run_config["giva.rank"]})
        return Message(RecordDict({"v": answer}), reply_to=message)

    grid = LocalGrid(count, NODES, {"giva.rank": 4})
    first = [dict(reply.content.config_records["v"]) for reply in grid.send_and_receive(messages(grid))]
    [second] = grid.send_and_receive(messages(grid)[1:])
    assert first == [{"seen": 0, "partition": 0, "rank": 4}, {"seen": 0, "partition": 1, "rank": 4}]
    assert dict(second.content.config_records["v"]) == {"seen": 1, "partition": 1, "rank": 4}


def test_app_that_raises_is_an_error_reply_without_its_text() -> None:
    def broken(message: Message, context: Context) -> Message:
        if context.node_id == 5:
            raise KeyError("secret")
        return echo(message, context)

    grid = LocalGrid(broken, NODES, {})
    failed, fine = grid.send_and_receive(messages(grid))
    assert failed.has_error() and failed.error.reason == "KeyError"
    assert not fine.has_error()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interruptions_are_not_swallowed(stop: type[BaseException]) -> None:
    def interrupted(message: Message, context: Context) -> Message:
        raise stop

    grid = LocalGrid(interrupted, NODES, {})
    with pytest.raises(stop):
        grid.send_and_receive(messages(grid))
