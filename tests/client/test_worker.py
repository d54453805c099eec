"""A worker in processes of its own: a whole run over its socket, no network, limits, strangers at the socket."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from live_worker import ROOMY, ROOT, LiveWorker, federate, hello, request, site_toml

from client import service, worker_process
from client.frames import ANSWER
from client.isolation import interfaces
from client.servicer import Servicer, check_request, listen
from client.site_file import SiteFile
from client.wire import codec, link
from client.wire import worker_pb2 as pb
from client.worker_tasks import Limits, Task, TaskRunner
from giva_core.config import RunConfig
from giva_core.errors import ConfigError, GivaError, ProtocolError, public_reason
from giva_core.protocol import Hello, Payload
from server.run_store import RunStore
from server.simulate import simulate


@pytest.fixture(scope="module")
def workers(toy_model: Path, toy_folder: Path) -> Iterator[list[LiveWorker]]:
    """A worker for each of the three toy sites."""
    with ExitStack() as stack:
        policy = {"allow_share_counts": True, "max_rank": 8}
        yield [
            stack.enter_context(LiveWorker(f"site-{number}", toy_model, toy_folder / f"site-{number}", policy=policy))
            for number in (1, 2, 3)
        ]


@pytest.fixture
def config(toy_config: RunConfig) -> RunConfig:
    return toy_config.replace(**ROOMY, rounds__num_rounds=2)


def test_workers_give_the_vectors_of_one_process_and_load_the_model_once(
    workers: list[LiveWorker], config: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = store.last_state(simulate(config, store))
    first = federate(config, store, 71, workers, monkeypatch)
    second = federate(config.replace(train__learning_rate=0.02), store, 72, workers, monkeypatch)
    for worker in workers:
        status = worker.link.status()
        assert (status.model_loads, status.killed, status.busy, status.run) == (1, 0, False, "")
        assert status.done > 20 and status.memory_bytes > 1 << 27
    state, other = store.last_state(first), store.last_state(second)
    assert state.arrays.keys() == alone.arrays.keys()
    assert store.run(first).facts["bases_digest"] == store.runs()[-1].facts["bases_digest"] != ""
    assert all(state.arrays[name].tobytes() == array.tobytes() for name, array in alone.arrays.items())
    assert any(state.arrays[name].tobytes() != array.tobytes() for name, array in other.arrays.items())


def processes(worker: LiveWorker) -> list[int]:
    """The worker and its child."""
    parent = worker.process.pid
    threads = Path(f"/proc/{parent}/task").iterdir()
    children = " ".join((thread / "children").read_text() for thread in threads).split()
    return [parent, *map(int, children)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_worker_has_no_network_and_no_socket_but_its_own(workers: list[LiveWorker], config: RunConfig) -> None:
    worker = workers[0]
    assert isinstance(worker.ask("query.hello", config, hello()), Payload)
    assert len(processes(worker)) == 2
    for pid in processes(worker):
        if interfaces():
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert [line.partition(":")[0].strip() for line in devices] == ["lo"]
        assert len(Path(f"/proc/{pid}/net/route").read_text().splitlines()) <= 1
        for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
            assert len(Path(f"/proc/{pid}/net/{table}").read_text().splitlines()) == 1, table
    parent, child = processes(worker)
    # a connection counts as the messenger's: it stands in the table of who opened it
    tables = [Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:] for pid in (parent, "self")]
    unix = {line.split()[6] for table in tables for line in table}
    assert sockets(parent) and sockets(parent) <= unix
    assert sockets(child) == set()


def sockets(pid: int) -> set[str]:
    """The numbers of a process's open sockets."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def test_only_owner_and_group_may_ask(workers: list[LiveWorker]) -> None:
    path = workers[0].socket
    assert path.stat().st_mode & 0o777 == 0o660 and path.parent.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "query.secrets"}, "protocol: unknown kind of message"),
        ({"run": "../../etc"}, "protocol: the run has no usable id"),
        ({"config": "not json"}, "config: the run's configuration cannot be read"),
        ({"config": "[" * 100_000}, "config: the run's configuration cannot be read"),
        ({"config": "[]"}, "config: the run's configuration cannot be read"),
        ({"config": '{"giva.rnk": 1}'}, "config"),
        ({"settings": {"giva__rank": 9}}, "policy: the site's max-rank does not allow rank 9"),
        ({"settings": {"method": "vera"}}, "policy: the site's methods does not allow the method vera"),
        ({"settings": {"model__path": "/etc"}}, "policy: the site's models do not include the run's"),
        ({"kind": "train.round"}, "protocol: message lacks bases"),
        ({"kind": "train.calibrate"}, "protocol: message lacks stage"),
        ({"payload": Payload()}, "protocol: message lacks protocol"),
    ],
)
def test_what_a_worker_refuses(
    workers: list[LiveWorker], config: RunConfig, change: dict[str, Any], reason: str
) -> None:
    worker = workers[1]
    asked = request("query.hello", config.replace(**change.pop("settings", {})), change.pop("payload", hello()))
    for name, value in change.items():
        setattr(asked, name, value)
    before = worker.link.status()
    assert worker.link.ask(asked, 60).reason == reason
    after = worker.link.status()
    assert (after.refused, after.done) == (before.refused + 1, before.done)


def test_a_request_takes_its_place_before_it_is_read(
    toy_model: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "site.toml"
    path.write_text(site_toml("a", toy_model, toy_folder / "site-1", worker={"queue": 1}), encoding="utf-8")
    site = SiteFile.read(path)
    runner = TaskRunner(path, Limits(60.0, queue=1), {})
    servicer, answers, parsed = Servicer(site, runner, ""), [], []

    def parse(data: bytes) -> pb.Request:
        parsed.append(data)
        if len(parsed) < 3:  # while this one is read, another comes
            answers.append(pb.Reply.FromString(servicer.ask(data + b"x", None)).reason)  # type: ignore[arg-type]
        raise ProtocolError("a request cannot be read", public="the request cannot be read")

    monkeypatch.setattr(codec, "parse_request", parse)
    answers.append(pb.Reply.FromString(servicer.ask(b"", None)).reason)  # type: ignore[arg-type]
    assert parsed == [b"", b"x"]
    assert answers == ["busy: the site's queue is full", *["protocol: the request cannot be read"] * 2]
    assert runner.progress().refused == 3
    parsed[:] = [b""] * 9
    assert pb.Reply.FromString(servicer.ask(b"", None)).reason == answers[1]  # type: ignore[arg-type]


class Parsed:
    """A parsed request to which there can be a weak reference, unlike to protobuf's own."""

    def __init__(self, data: bytes) -> None:
        self._message = pb.Request.FromString(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)


def note_parsed(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Parsed]]:
    """References to every request that is parsed, which do not keep it."""
    parsed: list[weakref.ref[Parsed]] = []

    def noted(data: bytes) -> Parsed:
        message = Parsed(data)
        parsed.append(weakref.ref(message))
        return message

    monkeypatch.setattr(codec, "parse_request", noted)
    return parsed


def request_of(kind: str, config: RunConfig, payload: Payload) -> pb.Request:
    """A request with the protocol's version, as a link sends it."""
    asked = request(kind, config, payload)
    asked.protocol = codec.WIRE_VERSION
    return asked


def test_a_request_that_waits_is_kept_once(
    toy_model: Path, toy_folder: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "site.toml"
    path.write_text(site_toml("a", toy_model, toy_folder / "site-1", policy={"max_rank": 8}), encoding="utf-8")
    parsed = note_parsed(monkeypatch)

    class Waiting(Future[bytes]):
        def result(self, timeout: float | None = None) -> bytes:
            return f"{[message() for message in parsed]}".encode()

    class Runner(TaskRunner):
        def submit(self, task: Task) -> Future[bytes]:
            return Waiting()

    servicer = Servicer(SiteFile.read(path), Runner(path, Limits(60.0), {}), "")
    asked = request_of("query.hello", config, hello()).SerializeToString()
    assert servicer.ask(asked, SimpleNamespace(is_active=lambda: True)) == b"[None]"  # type: ignore[arg-type]


def test_work_keeps_a_message_once(
    toy_model: Path, toy_folder: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "site.toml"
    path.write_text(site_toml("a", toy_model, toy_folder / "site-1", policy={"max_rank": 8}), encoding="utf-8")
    parsed, kept = note_parsed(monkeypatch), []

    def answer(kind: str, request: Payload, *_: object, **__: object) -> Payload:
        kept.append((tracemalloc.get_traced_memory()[0] - before, [message() for message in parsed]))
        return Payload()

    monkeypatch.setattr(service, "answer", answer)
    state = np.random.default_rng(0).random(1 << 20)
    asked = request_of("train.round", config, Payload({"state": state}))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        outcome, reply = worker_process.work(SiteFile.read(path), asked.SerializeToString(), lambda told: None)
    finally:
        tracemalloc.stop()
    [(bytes_, messages)] = kept
    assert messages == [None] and state.nbytes <= bytes_ < 1.5 * state.nbytes
    assert outcome == ANSWER and pb.Reply.FromString(reply).WhichOneof("outcome") == "payload"  # though it is empty


def test_questions_are_counted_over_a_restart(toy_model: Path, toy_folder: Path, config: RunConfig) -> None:
    def calibrate(worker: LiveWorker, factor: float) -> Payload | str:
        state = worker.ask("query.state", config)
        assert isinstance(state, Payload)
        question = Payload({"state": state.array("state") * factor}, {"stage": "range", "previous": ""})
        return worker.ask("train.calibrate", config, question, run="5")

    worker = LiveWorker("a", toy_model, toy_folder / "site-1", worker={"queue": 0})
    with worker:
        assert isinstance(calibrate(worker, 1.0), Payload)
    assert worker.process.returncode == 0 and not worker.socket.exists()
    assert "Traceback" not in worker.said() and str(toy_folder) not in worker.said()
    with worker:
        assert isinstance(calibrate(worker, 1.0), Payload)
        assert calibrate(worker, 2.0) == "protocol: more calibration questions than planned"
        second = subprocess.run(
            [sys.executable, "-m", "client.worker", str(worker.site_file)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1 and "another worker answers" in second.stderr
        pids = processes(worker)
        worker.process.kill()  # the child ends with it, and the next worker takes over the socket
        worker.process.wait()
    assert worker.socket.is_socket() and len(pids) == 2
    with worker:
        assert worker.link.status().done == 0


# -- strangers at the socket ------------------------------------------------------------------------------------------

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


def frame(kind: int, flags: int, stream: int, content: bytes, length: int | None = None) -> bytes:
    """A frame of HTTP/2, of another length than its content's where told."""
    size = len(content) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + content


def call(data: bytes, ends: bool, length: int | None = None) -> bytes:
    """The bytes of one call of `Ask`."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{link.SERVICE}/Ask",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
    message = b"\0" + struct.pack(">I", len(data) if length is None else length) + data
    return _PREFACE + _SETTINGS + frame(1, 4, 1, block) + frame(0, int(ends), 1, message)


def _text(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()


def raw_bytes(rng: random.Random, good: bytes) -> bytes:
    """What somebody who is no gRPC client might send."""
    match rng.randrange(9):
        case 0:
            return rng.randbytes(rng.randint(0, 300))
        case 1:
            return _PREFACE + rng.randbytes(rng.randint(0, 300))
        case 2:
            return (
                _PREFACE
                + _SETTINGS
                + frame(rng.randrange(12), rng.randrange(256), rng.randrange(4), b"x" * 9, 0xFFFFFF)
            )
        case 3:
            return call(good, True)[: rng.randint(1, 300)]
        case 4:
            return call(good[:200], False, rng.choice([0, 1, 2**31, 2**32 - 1]))
        case 5:
            return call(good[:200], True, rng.choice([0, 1, 2**31, 2**32 - 1]))
        case 6:
            return call(rng.randbytes(rng.randint(0, 2000)), True)
        case 7:
            return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        case _:
            data = bytearray(call(good[:500], True))
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)


def strange_request(rng: random.Random, good: pb.Request) -> bytes:
    """What a messenger might send that means no good."""
    message = pb.Request.FromString(good.SerializeToString())
    match rng.randrange(10):
        case 0:
            return rng.randbytes(rng.randint(0, 300))
        case 1:
            data = bytearray(good.SerializeToString())
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)
        case 2:
            message.protocol = rng.choice([0, 2, 2**32 - 1])
        case 3:
            message.kind = rng.choice(["", "query", "train.round\n", "x" * 10_000, "../hello", "query.Hello"])
        case 4:
            message.run = rng.choice(["", "-1", "../1", "9" * 30, "\0"])
        case 5:
            message.config = rng.choice(["", "{", "null", '{"a": ' * 5000, '{"giva.rank": 1e999}', '{"giva.rank": -1}'])
        case 6:
            message.payload.arrays.add(name="state", dtype="<f4", shape=[2**62, 2**62], data=rng.randbytes(8))
            message.kind = "train.round"
        case 7:
            message.payload.arrays.add(name="state", dtype=rng.choice(["O", "|V8", "<U9", "", "f4,f4"]), shape=[1])
            message.kind = "train.round"
        case 8:
            return b"\x2a\xff\xff\xff\xff\x7f" + good.SerializeToString()  # a field of 34 GB
        case _:
            return good.SerializeToString()[: rng.randint(0, 60)]
    return message.SerializeToString()


def fuzz(worker: LiveWorker, config: RunConfig, cases: int) -> set[str]:
    """The reasons that were given; a crash, a hang or a good request that is not answered fails."""
    rng, good = random.Random(cases), request("query.hello", config, hello())
    good.protocol = codec.WIRE_VERSION
    reasons: set[str] = set()
    before = processes(worker)
    with grpc.insecure_channel(link.address(worker.socket)) as channel:
        ask = channel.unary_unary(f"/{link.SERVICE}/Ask", lambda data: data, pb.Reply.FromString)
        for _ in range(cases // 2):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(60)
                stranger.connect(str(worker.socket))
                with suppress(BrokenPipeError, ConnectionResetError):
                    stranger.sendall(raw_bytes(rng, good.SerializeToString()))
                    if rng.random() < 0.8:  # half-closed; the others are gone without a word
                        stranger.shutdown(socket.SHUT_WR)
                        while stranger.recv(65536):
                            pass
            reasons.add(ask(strange_request(rng, good), timeout=60).reason)
    assert processes(worker) == before
    assert len(list(Path(f"/proc/{before[0]}/fd").iterdir())) < 200
    assert "Traceback" not in worker.said()
    return reasons


def test_strangers_at_the_socket_change_nothing(workers: list[LiveWorker], config: RunConfig) -> None:
    answer = workers[2].ask("query.hello", config, hello())
    reasons = fuzz(workers[2], config, 400)
    assert {"protocol: the request cannot be read", "protocol: unknown kind of message"} <= reasons
    assert all(reason.partition(":")[0] in ("", "protocol", "config", "policy") for reason in reasons), reasons
    assert workers[2].ask("query.hello", config, hello()) == answer


@pytest.mark.slow
def test_ten_thousand_strangers(workers: list[LiveWorker], config: RunConfig) -> None:
    answer = workers[2].ask("query.hello", config, hello())
    assert len(fuzz(workers[2], config, 10_000)) > 5
    assert workers[2].ask("query.hello", config, hello()) == answer


# -- without processes ------------------------------------------------------------------------------------------------


def site(toy_model: Path, toy_folder: Path, **tables: Any) -> SiteFile:
    import tomllib

    return SiteFile.from_tables(tomllib.loads(site_toml("a", toy_model, toy_folder, **tables)), Path("/"))


def test_work_begins_within_the_site_s_hours_and_may_end_at_any(
    toy_model: Path, toy_folder: Path, config: RunConfig
) -> None:
    own = site(toy_model, toy_folder, policy={"hours": "20:00-06:00"})
    check_request(request("train.round", config), own, datetime(2026, 1, 2, 23, 0))
    check_request(request("query.finish", config), own, datetime(2026, 1, 2, 12, 0))
    with pytest.raises(GivaError) as caught:
        check_request(request("train.round", config), own, datetime(2026, 1, 2, 12, 0))
    assert public_reason(caught.value) == "policy: the site's hours does not allow work at this time of day"


class NoRunner:
    """Refuses to be asked."""

    def submit(self, task: Any) -> None:
        raise RuntimeError("/srv/secret")

    def count_refused(self) -> None:
        pass


def test_a_defect_of_the_worker_tells_its_kind_alone(
    toy_model: Path, toy_folder: Path, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    servicer = Servicer(site(toy_model, toy_folder), NoRunner(), "none")  # type: ignore[arg-type]
    asked = request("query.hello", config, hello())
    asked.protocol = codec.WIRE_VERSION
    reply = pb.Reply.FromString(servicer.ask(asked.SerializeToString(), _Caller()))  # type: ignore[arg-type]
    assert reply.reason == "internal: RuntimeError" and "secret" not in caplog.text


class _Caller:
    def is_active(self) -> bool:
        return True


def test_a_socket_s_path_has_an_end(toy_model: Path, toy_folder: Path) -> None:
    servicer = Servicer(site(toy_model, toy_folder), NoRunner(), "none")  # type: ignore[arg-type]
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.raises(ConfigError, match="longer than a Unix socket's may be"),
    ):
        listen(servicer, Path(folder) / ("x" * 120), 1, 64)


def test_a_worker_says_who_it_is(workers: list[LiveWorker], config: RunConfig) -> None:
    found = workers[1].ask("query.hello", config, hello())
    assert isinstance(found, Payload)
    assert Hello.from_payload(found).site == "site-2" and Hello.from_payload(found).num_train == 32
    assert json.loads(config.to_json())["giva.rank"] == 2
