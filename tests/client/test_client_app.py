"""Message in, message out: failures tell their kind and nothing else, and questions are counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import app as client_app
from client.app import SITE_ERROR, answer, from_content, to_content
from client.policy import Policy
from giva_core.config import RunConfig
from giva_core.errors import DataError, GivaError
from giva_core.protocol import Payload

SECRET = "patient Miller in /data/ward.jsonl"


class Site:
    """Just enough of a trainer."""

    def __init__(self, config: RunConfig, policy: Policy | None) -> None:
        self.config, self.policy = config, policy


@pytest.fixture(autouse=True)
def task() -> Iterator[None]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield


@pytest.fixture
def context(toy_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.delenv("GIVA_DEBUG", raising=False)
    monkeypatch.setattr("client.trainer.get_trainer", lambda site, config: Site(config, site.policy))
    node = {"site": "a", "data-path": "/data", "model-path": "/model"}
    return Context(1, 5, node, RecordDict(), dict(toy_config.to_flat()))


def question(payload: Payload = Payload(), kind: str = "train.round") -> Message:  # noqa: B008
    return Message(to_content(payload), 5, kind)


def test_payloads_survive_flower_s_records() -> None:
    payload = Payload({"codes": np.arange(6, dtype=np.int16).reshape(2, 3)}, {"n": 3, "x": 0.5, "who": "a", "ok": True})
    again = from_content(to_content(payload))
    assert again.values == payload.values and again.arrays["codes"].dtype == np.int16
    np.testing.assert_array_equal(again.arrays["codes"], payload.arrays["codes"])


def test_an_answer_is_the_handler_s(context: Context) -> None:
    reply = answer(question(Payload(values={"n": 2})), context, lambda request, site: Payload(values=request.values))
    assert from_content(reply.content).values == {"n": 2}


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

    def fail(request: Payload, site: Any) -> Payload:
        raise error

    with caplog.at_level(logging.DEBUG):
        reply = answer(question(), context, fail)
    assert (reply.error.code, reply.error.reason) == (SITE_ERROR, reason)
    assert [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "giva.client"] == [
        ("ERROR", f"train.round failed: {reason}")
    ]
    assert SECRET not in caplog.text
    out, err = capfd.readouterr()
    assert SECRET not in out and (SECRET in err and "Traceback" in err) == debug


def test_a_configuration_that_cannot_be_read_is_a_failure_too(context: Context) -> None:
    context.run_config["giva.rnk"] = 3
    assert answer(question(), context, lambda request, site: Payload()).error.reason == "config"


def calibrate(context: Context, stage: str, codes: list[int]) -> str:
    """The reason of the refusal; empty for an answer."""
    payload = Payload({"codes": np.array(codes, np.int16)}, {"stage": stage, "previous": ""})
    reply = client_app.calibrate(question(payload, "train.calibrate"), context)
    return reply.error.reason if reply.has_error() else ""


def test_a_run_s_calibration_questions_are_counted(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app, "_calibrate", lambda request, site: Payload())
    refused = "protocol: more calibration questions than planned"
    assert [calibrate(context, stage, [1]) for stage in ("range", "left", "right")] == ["", "", ""]
    assert calibrate(context, "right", [1]) == ""  # the same question has the same answer
    assert calibrate(context, "right", [2]) == calibrate(context, "coordinates", [1]) == refused
    assert calibrate(context, "right", [1]) == ""
    fresh = Context(2, 5, context.node_config, RecordDict(), context.run_config)
    assert calibrate(fresh, "right", [2]) == ""  # another run


def test_a_simulated_site_counts_nothing(context: Context, monkeypatch: pytest.MonkeyPatch, toy_config) -> None:
    monkeypatch.setattr(client_app, "_calibrate", lambda request, site: Payload())
    context.node_config = {"partition-id": 0}
    assert [calibrate(context, "right", [number]) for number in range(4)] == [""] * 4
    assert not context.state.config_records
