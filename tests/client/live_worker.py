"""A real worker process over a real Unix socket, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from client.wire import worker_pb2 as pb
from client.wire.codec import from_wire, to_wire
from client.wire.link import Link
from giva_core.config import RunConfig
from giva_core.protocol import PROTOCOL_VERSION, Payload
from server.run_store import RunStore
from server.simulate import simulate

ROOT = Path(__file__).parents[2]
ROOMY = {"giva__rank": 2, "giva__oversampling": 2}  # sketches of 4 columns, twice, in layers of 16


def site_toml(name: str, model: Path, data: Path, /, **tables: Mapping[str, Any]) -> str:
    """A site file; `tables` are further keys of its tables, with underscores for dashes."""
    given: dict[str, dict[str, Any]] = {
        "data": {"folder": str(data)},
        f"models.{model.name}": {"path": str(model)},
        "policy": {},
        "worker": {"device": "cpu"},
        "superlink": {},
    }
    for title, table in tables.items():
        given[title].update({key.replace("_", "-"): value for key, value in table.items()})
    lines = [f"name = {json.dumps(name)}"]
    for title, table in given.items():
        lines += [f"[{title}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def request(kind: str, config: RunConfig, payload: Payload = Payload(), run: str = "1") -> pb.Request:  # noqa: B008
    """A request as the messenger makes it."""
    return pb.Request(kind=kind, run=run, config=config.to_json(), payload=to_wire(payload))


def hello() -> Payload:
    """The question with which a run begins."""
    return Payload(values={"config": "", "protocol": PROTOCOL_VERSION})


class LiveWorker:
    """A worker in a process of its own, with its socket and cache in a folder of its own; for a `with` statement."""

    def __init__(self, name: str, model: Path, data: Path, /, **tables: Mapping[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="giva-w-")  # short: a socket's path has about 100 letters
        self.folder = Path(self._folder.name)
        self.socket = self.folder / "run" / "worker.sock"
        worker = {"socket": str(self.socket), "cache": str(self.folder / "cache"), **tables.pop("worker", {})}
        self.site_file = self.folder / "site.toml"
        self.site_file.write_text(site_toml(name, model, data, worker=worker, **tables), encoding="utf-8")
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process: subprocess.Popen[bytes]
        self.link: Link

    def __enter__(self) -> Self:
        self.log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "client.worker", str(self.site_file)],
            cwd=ROOT,
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
        )
        self.link = Link(self.socket, patience_seconds=240)  # the machine may be busy with much else
        self.link.status()
        return self

    def __exit__(self, *exception: object) -> None:
        self.link.__exit__()
        self.process.terminate()
        self.process.wait(60)
        self.log.close()

    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def ask(self, kind: str, config: RunConfig, payload: Payload = Payload(), run: str = "1") -> Payload | str:  # noqa: B008
        """The worker's answer, or its reason for not giving one."""
        reply = self.link.ask(request(kind, config, payload, run), timeout_seconds=120)
        return from_wire(reply.payload) if reply.WhichOneof("outcome") == "payload" else reply.reason


def federate(
    config: RunConfig, store: RunStore, run: int, workers: Sequence[LiveWorker], monkeypatch: pytest.MonkeyPatch
) -> str:
    """A federation whose messengers ask these workers; `run` is Flower's id of it."""
    nodes = {1001 + index: {"worker": str(worker.socket)} for index, worker in enumerate(workers)}
    monkeypatch.setattr("server.simulate.simulated_nodes", lambda config: nodes)
    monkeypatch.setattr("server.local_grid._RUN_ID", run)
    monkeypatch.setenv("GIVA_SIMULATION", "0")
    return simulate(config, store)
