"""Flower's messages on their way to the worker and back, with a worker that echoes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client.messenger import SITE_ERROR, pass_on, to_content, to_request
from client.records import from_content
from client.wire import codec, link
from client.wire import worker_pb2 as pb
from giva_core.protocol import Payload


@pytest.fixture(autouse=True)
def task() -> Iterator[None]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="giva-m-") as name:
        yield Path(name)


def context(socket: Path, **more: Any) -> Context:
    run_config = {"giva.rank": 4, "train.learning-rate": 0.5, "name": "ä", "model.local-files-only": True}
    return Context(17, 5, {"worker": str(socket), **more}, RecordDict(), run_config)


def question(arrays: dict[str, Array], **values: Any) -> Message:
    content = RecordDict({"arrays": ArrayRecord(arrays), "values": ConfigRecord(values)})
    return Message(content, 5, "train.round", ttl=60.0)


@pytest.fixture
def worker(folder: Path) -> Iterator[Callable[[Callable[[pb.Request], pb.Reply]], Path]]:
    """Starts a worker whose answers are a function's; gives its socket."""
    servers: list[grpc.Server] = []

    def start(answer: Callable[[pb.Request], pb.Reply]) -> Path:
        server = grpc.server(ThreadPoolExecutor(1), options=link.server_options(1 << 20))
        ask = lambda data, _: answer(codec.parse_request(data)).SerializeToString()  # noqa: E731
        link.add_to_server(server, ask, ask)
        server.add_insecure_port(link.address(folder / "w.sock"))
        server.start()
        servers.append(server)
        return folder / "w.sock"

    yield start
    for server in servers:
        server.stop(None).wait()


ARRAYS = {
    "f": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "codes": np.array([-3, 4], np.int16),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 4), np.int8),
}


def test_a_message_arrives_as_it_was_and_so_does_the_answer(worker: Any) -> None:
    seen: list[pb.Request] = []

    def echo(request: pb.Request) -> pb.Reply:
        seen.append(request)
        return pb.Reply(protocol=1, payload=codec.to_wire(codec.from_wire(request.payload)))

    arrays = {name: Array(array) for name, array in ARRAYS.items()}
    values = {"bases": "", "server-round": 3, "proximal-mu": 0.5, "flag": True}
    reply = pass_on(question(arrays, **values), context(worker(echo)))
    reply = message_from_proto(message_to_proto(reply))
    found = from_content(reply.content)
    assert found.values == values and set(found.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    [request] = seen
    assert (request.kind, request.run, request.protocol) == ("train.round", "17", 1)
    assert json.loads(request.config) == context(Path()).run_config


def test_a_message_longer_than_the_site_takes_is_told_as_such(worker: Any) -> None:
    asked: list[int] = []

    def answer(request: pb.Request) -> pb.Reply:
        asked.append(request.ByteSize())
        return pb.Reply(protocol=1, payload=codec.to_wire(Payload({"a": np.zeros(6 << 20, np.int8)})))

    own = context(worker(answer))
    reply = pass_on(question({"a": Array(np.zeros(2 << 20, np.int8))}), own)
    assert reply.error.reason == "protocol: the message is longer than the site's message-mib" and asked == []
    reply = pass_on(question({"a": Array(np.zeros(1 << 19, np.int8))}), own)  # the answer may be of any length
    assert from_content(reply.content).array("a").size == 6 << 20


def test_array_bytes_are_passed_on_as_they_are() -> None:
    request = to_request(question({"f": Array(ARRAYS["f"])}), context(Path()))
    assert request.payload.arrays[0].data == ARRAYS["f"].tobytes()
    again = to_content(request.payload).array_records["arrays"]["f"]
    assert again == Array(ARRAYS["f"])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (pb.Reply(protocol=1, reason="limit: the site's task-seconds"), "limit: the site's task-seconds"),
        (pb.Reply(protocol=1), "the site's worker gave no answer"),
    ],
)
def test_the_worker_s_reason_is_all_that_travels(worker: Any, reply: pb.Reply, reason: str) -> None:
    answer = pass_on(question({}), context(worker(lambda request: reply)))
    assert (answer.error.code, answer.error.reason) == (SITE_ERROR, reason)


def test_a_worker_that_is_not_there(folder: Path) -> None:
    answer = pass_on(question({}), context(folder / "none.sock"), patience_seconds=0.1)
    assert answer.error.reason == "the site's worker does not answer"


def test_a_worker_that_breaks(worker: Any) -> None:
    def fail(request: pb.Request) -> pb.Reply:
        raise ValueError("/srv/secret")

    answer = pass_on(question({}), context(worker(fail)), patience_seconds=0.1)
    assert answer.error.reason == "the site's worker does not answer"


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"worker": None}, "config: the node's configuration has no worker"),
        ({"data-path": "/srv/data"}, "config: the node's configuration has other keys than worker"),
    ],
)
def test_a_node_says_where_its_worker_is_and_nothing_else(folder: Path, node: dict[str, Any], reason: str) -> None:
    own = context(folder / "none.sock", **node)
    if own.node_config["worker"] is None:
        del own.node_config["worker"]
    assert pass_on(question({}), own, patience_seconds=0.1).error.reason == reason


def test_arrays_that_are_no_numpy_arrays(folder: Path) -> None:
    strange = Array("float32", (1,), "torch.tensor", b"1234")
    reply = pass_on(question({"a": strange}), context(folder / "none.sock"), patience_seconds=0.1)
    assert reply.error.reason == "protocol: an array has an unknown form"
