"""Asking sites: every site asked has an outcome, whatever came, in whatever order, or did not come."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.serde import message_to_proto

from giva_core.protocol import Payload
from server import exchange
from server.exchange import Answer, ask, from_content, message_bytes, to_content
from server.local_grid import LocalGrid

NODES = {"site-c": 11, "site-a": 12, "site-b": 13}
QUESTION = Payload({"x": np.arange(5, dtype=np.float32)}, {"round": 2})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.0)


def echo(message: Message, context: Context) -> Message:
    """Each node answers with its id and as many numbers."""
    payload = from_content(message.content)
    node_id = context.node_id
    arrays = {"y": payload.array("x").sum() + np.zeros(node_id)}
    return Message(to_content(Payload(arrays, {"node": node_id, **payload.values})), reply_to=message)


class ScriptedGrid(LocalGrid):
    """Answers in reverse order, one node a pull, and not at all for some nodes."""

    def __init__(self, app: object = echo, silent: Collection[int] = (), unsent: Collection[int] = ()) -> None:
        super().__init__(app, {node_id: {} for node_id in NODES.values()}, {})  # type: ignore[arg-type]
        self.silent, self.unsent = silent, unsent
        self.asked: dict[str, Message] = {}
        self.came: list[int] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        self.asked.update(zip(ids, messages, strict=True))
        kept = zip(ids, messages, strict=True)
        return [None if m.metadata.dst_node_id in self.unsent else i for i, m in kept]  # type: ignore[misc]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        heard = [i for i in message_ids if self.asked[i].metadata.dst_node_id not in self.silent]
        self.came += [self.asked[i].metadata.dst_node_id for i in heard[-1:]]
        return super().pull_messages(heard[-1:])


def ask_all(grid: LocalGrid, deadline: float = 60.0, nodes: Mapping[str, int] = NODES) -> list[Answer]:
    return ask(grid, nodes, "query.hello", QUESTION, deadline_seconds=deadline, group="7")


def test_payload_comes_back_through_flower_s_records() -> None:
    payload = Payload(
        {"b": np.arange(6, dtype=np.int16).reshape(2, 3), "a": np.zeros(0, np.float32)},
        {"text": "ä", "n": -3, "x": 0.5, "yes": True},
    )
    found = from_content(to_content(payload))
    assert found.values == payload.values
    assert list(found.arrays) == ["b", "a"]
    for name, array in payload.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    assert from_content(to_content(Payload())) == Payload()


def test_answers_are_sorted_by_site_whatever_order_they_came_in() -> None:
    grid = ScriptedGrid()
    answers = ask_all(grid)
    assert grid.came == [13, 12, 11]
    assert [(a.site, a.node_id, a.status, a.reason) for a in answers] == [
        ("site-a", 12, "ok", ""),
        ("site-b", 13, "ok", ""),
        ("site-c", 11, "ok", ""),
    ]
    for answer in answers:
        assert answer.payload is not None
        assert answer.payload.values == {"node": answer.node_id, "round": 2}
        np.testing.assert_array_equal(answer.payload.array("y"), np.full(answer.node_id, 10.0))


def test_questions_carry_kind_group_and_time() -> None:
    grid = ScriptedGrid()
    ask_all(grid, deadline=60)
    assert {(m.metadata.message_type, m.metadata.group_id) for m in grid.asked.values()} == {("query.hello", "7")}
    assert {m.metadata.dst_node_id for m in grid.asked.values()} == set(NODES.values())
    assert min(m.metadata.ttl for m in grid.asked.values()) > 60


def test_bytes_are_those_of_the_serialised_messages() -> None:
    replies: dict[int, int] = {}

    def counted(message: Message, context: Context) -> Message:
        reply = echo(message, context)
        replies[context.node_id] = len(message_to_proto(reply).SerializeToString())
        return reply

    grid = ScriptedGrid(counted)
    answers = ask_all(grid)
    sizes = {m.metadata.dst_node_id: len(message_to_proto(m).SerializeToString()) for m in grid.asked.values()}
    assert all(message_bytes(m) == sizes[m.metadata.dst_node_id] for m in grid.asked.values())
    assert {a.node_id: a.bytes_down for a in answers} == sizes
    assert {a.node_id: a.bytes_up for a in answers} == replies
    assert min(sizes.values()) > QUESTION.arrays["x"].nbytes
    assert replies[13] - replies[11] == 2 * 8


def test_error_replies_belong_to_the_site_that_was_asked() -> None:
    def broken(message: Message, context: Context) -> Message:
        if context.node_id == 12:
            reply = Message(Error(100, "data: 3 rows lack a label"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # the server's own id, as Flower's link sets it
            return reply
        if context.node_id == 13:
            return Message(Error(7), reply_to=message)
        return echo(message, context)

    answers = ask_all(ScriptedGrid(broken))
    assert [(a.site, a.node_id, a.status, a.reason) for a in answers] == [
        ("site-a", 12, "failed", "data: 3 rows lack a label"),
        ("site-b", 13, "failed", "error code 7"),
        ("site-c", 11, "ok", ""),
    ]
    assert [a.payload is None for a in answers] == [True, True, False]
    assert all(a.bytes_up > 0 and a.bytes_down > 0 for a in answers)


def test_long_reasons_are_cut() -> None:
    def talkative(message: Message, context: Context) -> Message:
        return Message(Error(100, "x" * 9_000), reply_to=message)

    assert {len(a.reason) for a in ask_all(ScriptedGrid(talkative))} == {500}


def test_sites_without_an_answer_at_the_deadline_are_missing() -> None:
    answers = ask_all(ScriptedGrid(silent={11, 13}), deadline=0.05)
    assert [(a.site, a.status, a.reason) for a in answers] == [
        ("site-a", "ok", ""),
        ("site-b", "missing", "no answer within 0.05 s"),
        ("site-c", "missing", "no answer within 0.05 s"),
    ]
    assert all(a.bytes_down > 0 and (a.bytes_up == 0) == (a.status == "missing") for a in answers)


class Clock:
    """A clock that goes on by a quarter of a second at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.25
        return self.now

    def sleep(self, seconds: float) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(exchange, "time", made)
    return made


def test_nobody_waits_for_nodes_that_have_left(clock: Clock) -> None:
    class Leaving(ScriptedGrid):
        def get_node_ids(self) -> Iterable[int]:
            return [12]

    answers = ask_all(Leaving(silent={11, 13}), deadline=3600.0)
    assert [(a.site, a.status, a.reason) for a in answers] == [
        ("site-a", "ok", ""),
        ("site-b", "missing", "node left"),
        ("site-c", "missing", "node left"),
    ]
    assert exchange.LEFT_SECONDS < clock.now < 60


def test_a_node_that_is_out_of_sight_for_a_moment_or_not_alone_is_waited_for(clock: Clock) -> None:
    class Blinking(ScriptedGrid):
        def get_node_ids(self) -> Iterable[int]:
            return [11] if clock.now % 7 < 2 else []

    class OneStays(ScriptedGrid):
        def get_node_ids(self) -> Iterable[int]:
            return [13]

    for grid in (Blinking(silent={11}), OneStays(silent={11, 13})):
        clock.now = 0.0
        assert {a.reason for a in ask_all(grid, deadline=300.0)} == {"", "no answer within 300 s"}


def test_messages_that_could_not_be_sent() -> None:
    answers = ask_all(ScriptedGrid(unsent={13}))
    assert [(a.site, a.status) for a in answers] == [("site-a", "ok"), ("site-b", "failed"), ("site-c", "ok")]
    assert answers[1].reason == "the message could not be sent"


def test_flower_sends_none_where_messages_are_too_large() -> None:
    class TooLarge(ScriptedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return []

    answers = ask_all(TooLarge())
    assert {(a.status, a.reason) for a in answers} == {("failed", "the message could not be sent")}
    assert [a.site for a in answers] == sorted(NODES)


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (2,), "numpy.ndarray", b"no array"),
        Array("float32", (2,), "pickle", b"\x80\x04N."),
        Array("float32", (2,), "numpy.ndarray", b""),
    ],
)
def test_an_answer_that_cannot_be_read_is_that_site_s_failure(array: Array) -> None:
    def hostile(message: Message, context: Context) -> Message:
        if context.node_id != 12:
            return echo(message, context)
        return Message(RecordDict({"a": ArrayRecord({"y": array}), "v": ConfigRecord()}), reply_to=message)

    answers = ask_all(ScriptedGrid(hostile))
    assert [(a.site, a.status) for a in answers] == [("site-a", "failed"), ("site-b", "ok"), ("site-c", "ok")]
    assert answers[0].reason.startswith("unreadable answer: ")


def test_pickled_objects_are_not_loaded() -> None:
    pickled = np.array([{"any": "object"}], dtype=object)

    def hostile(message: Message, context: Context) -> Message:
        import io

        buffer = io.BytesIO()
        np.save(buffer, pickled, allow_pickle=True)
        array = Array("object", (1,), "numpy.ndarray", buffer.getvalue())
        return Message(RecordDict({"a": ArrayRecord({"y": array})}), reply_to=message)

    assert {(a.status, a.reason) for a in ask_all(ScriptedGrid(hostile))} == {
        ("failed", "unreadable answer: ValueError")
    }


@pytest.mark.parametrize(("answer_bytes", "at_once"), [(0, 3), (99, 3), (400, 2), (1000, 1), (5000, 1)])
def test_large_answers_are_pulled_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, answer_bytes: int, at_once: int
) -> None:
    class Counted(ScriptedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            asked_for.append(len(list(message_ids)))
            return super().pull_messages(message_ids)

    asked_for: list[int] = []
    monkeypatch.setattr(exchange, "PULLED_BYTES", 1000)
    answers = ask(Counted(), NODES, "query.hello", QUESTION, deadline_seconds=60.0, answer_bytes=answer_bytes)
    assert [answer.status for answer in answers] == ["ok"] * 3
    assert asked_for[0] == max(asked_for) == at_once


def test_arrays_that_were_taken_do_not_wait_for_the_collector() -> None:
    class Noting(ScriptedGrid):
        arrays: ClassVar[list[weakref.ref[Array]]] = []

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            self.arrays += [weakref.ref(array) for reply in replies for array in reply.content["arrays"].values()]
            return replies

    gc.disable()
    try:
        ask(Noting(), NODES, "query.hello", QUESTION, deadline_seconds=60.0, take=lambda a: replace(a, payload=None))
        assert len(Noting.arrays) == len(NODES) and not any(array() for array in Noting.arrays)
    finally:
        gc.enable()


def test_looks_that_find_nothing_take_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seconds:
        """A clock on which nothing passes but sleep, and what a call takes."""

        now = 0.0
        slept: ClassVar[list[float]] = []

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)
            self.now += seconds

    class Slow(ScriptedGrid):
        looks = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            self.looks += 1
            clock.now += 4.0
            return super().pull_messages(message_ids if self.looks in (4, 6, 7) else [])

    clock = Seconds()
    monkeypatch.setattr(exchange, "time", clock)
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.5)
    answers = ask(Slow(), NODES, "query.hello", QUESTION, deadline_seconds=60.0, answer_bytes=exchange.PULLED_BYTES)
    assert [answer.status for answer in answers] == ["ok"] * 3
    assert clock.slept == [12.0, 4.0]  # three calls in vain; one, between two with an answer
    clock.slept.clear()
    ask(Slow(silent=NODES.values()), NODES, "query.hello", QUESTION, deadline_seconds=40.0, answer_bytes=2**30)
    assert clock.slept == [12.0, 4.0]  # not beyond the deadline


def test_nobody_to_ask() -> None:
    class Untouched(ScriptedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise AssertionError("nothing to pull")

    assert ask_all(Untouched(), nodes={}) == []
