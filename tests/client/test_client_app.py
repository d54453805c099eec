"""The ClientApp: what it imports, whom it asks, and that failures tell their kind and nothing else."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.messenger import SITE_ERROR
from client.records import from_content, to_content
from client.servicer import KINDS
from giva_core.config import RunConfig
from giva_core.errors import DataError, GivaError
from giva_core.protocol import Payload

SECRET = "patient Miller in /data/ward.jsonl"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def task() -> Iterator[None]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield


@pytest.fixture
def context(toy_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.delenv("GIVA_DEBUG", raising=False)
    return Context(1, 5, {"partition-id": 1}, RecordDict(), dict(toy_config.to_flat()))


def question(payload: Payload = Payload(), kind: str = "train.round") -> Message:  # noqa: B008
    return Message(to_content(payload), 5, kind)


def test_payloads_survive_flower_s_records() -> None:
    payload = Payload({"codes": np.arange(6, dtype=np.int16).reshape(2, 3)}, {"n": 3, "x": 0.5, "who": "a", "ok": True})
    again = from_content(to_content(payload))
    assert again.values == payload.values and again.arrays["codes"].dtype == np.int16
    np.testing.assert_array_equal(again.arrays["codes"], payload.arrays["codes"])


def test_a_simulated_site_answers_here_with_its_own_folder(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def answer(kind: str, request: Payload, site: Any, config: RunConfig) -> Payload:
        seen.append((kind, request.values, site.name, config.giva.rank))
        return Payload(values={"n": 2})

    monkeypatch.setattr("client.service.answer", answer)
    reply = app(question(Payload(values={"m": 1}), "train.head"), context)
    assert from_content(reply.content).values == {"n": 2}
    assert seen == [("train.head", {"m": 1}, "site-2", 4)]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_answered_and_the_end_lets_go_of_the_model(
    context: Context, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    let_go: list[bool] = []
    monkeypatch.setattr("client.service.answer", lambda *args: Payload(values={"kind": args[0]}))
    monkeypatch.setattr("client.service.let_go", lambda: let_go.append(True))
    assert from_content(app(question(kind=kind), context).content).values == {"kind": kind}
    assert let_go == [True] * (kind == "query.finish")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError(SECRET, got=SECRET, public="unusable rows"), "data: unusable rows"),
        (GivaError(SECRET), "error"),
        (ValueError(SECRET), "internal: ValueError"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_a_failure_s_text_stays_and_shows_only_to_who_asks(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    reason: str,
    debug: bool,
) -> None:
    if debug:
        monkeypatch.setenv("GIVA_DEBUG", "1")

    def fail(*args: Any) -> Payload:
        raise error

    monkeypatch.setattr("client.service.answer", fail)
    with caplog.at_level(logging.DEBUG):
        reply = app(question(), context)
    assert (reply.error.code, reply.error.reason) == (SITE_ERROR, reason)
    assert [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "giva.client"] == [
        ("ERROR", f"train.round failed: {reason}")
    ]
    assert SECRET not in caplog.text
    out, err = capfd.readouterr()
    assert SECRET not in out and (SECRET in err and "Traceback" in err) == debug


def test_a_configuration_that_cannot_be_read_is_a_failure_too(context: Context) -> None:
    context.run_config["giva.rnk"] = 3
    assert app(question(), context).error.reason == "config"


def test_without_torch_a_simulated_site_says_what_is_missing(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.needs.find_spec", lambda name: None if name == "torch" else name)
    assert app(question(), context).error.reason == "dependency: what training needs is not installed"


_FORBIDDEN = ("torch", "transformers", "safetensors", "tqdm", "peft", "client.service", "client.data", "client.trainer")


def test_a_messenger_needs_flower_alone(tmp_path: Path) -> None:
    """A whole message, to a worker that is not there, where nothing that a worker needs can be imported."""
    code = f"""
import sys
from importlib.abc import MetaPathFinder

class Forbid(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith({_FORBIDDEN!r}):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Forbid())
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from client import messenger
from client.app import app

messenger.pass_on.__defaults__ = (0.0,)
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
context = Context(1, 5, {{"worker": {str(tmp_path / "none.sock")!r}}}, RecordDict(), {{}})
reply = app(Message(RecordDict({{"values": ConfigRecord({{"n": 1}})}}), 5, "query.hello"), context)
print(reply.error.code, reply.error.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{SITE_ERROR} the site's worker does not answer"
