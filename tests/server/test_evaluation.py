"""Evaluations join the records of their round, and none of them can take the round down."""

from __future__ import annotations

import pytest

from giva_core import metrics
from giva_core.config import TaskConfig
from giva_core.errors import UpdateError
from giva_core.protocol import Hello, Payload, evaluation_to_payload
from giva_core.types import ModelSchema, SiteEvaluation, SiteRecord
from server.evaluation import read_evaluations, total_metrics
from server.exchange import Answer

TASK = TaskConfig(labels=("no", "yes"))
METRICS = {"accuracy": 0.5, "macro_f1": 0.4, "mcc": 0.0}
HELLOS = {
    site: Hello(site, 40, 9, ModelSchema((), (), {}), "m", "s", "c", "v", "cpu") for site in ("a", "b", "c", "d", "e")
}


def answer(site: str, payload: Payload | None, status: str = "ok", reason: str = "") -> Answer:
    return Answer(site, 1, payload, status, reason, bytes_down=3, bytes_up=7)


def test_each_answer_finds_its_record() -> None:
    sound = evaluation_to_payload(SiteEvaluation(9, 0.5, METRICS))
    other = evaluation_to_payload(SiteEvaluation(9, 0.5, {"accuracy": 0.5, "bleu": 0.5}))
    text = Payload(values={**sound.values, "metric.mcc": "high"})
    answers = [
        answer("a", sound), answer("b", other), answer("c", text), answer("d", None, "missing", "node left"),
        answer("e", sound),
    ]  # fmt: skip
    before = [SiteRecord("e", "ok", num_examples=40, bytes_up=1), SiteRecord("a", "refused", "not finite")]
    records, evaluations = read_evaluations(answers, HELLOS, TASK, before)
    assert [(r.site, r.status, r.eval_examples, r.bytes_up) for r in records] == [
        ("a", "refused", 9, 7), ("b", "ok", 0, 7), ("c", "ok", 0, 7), ("d", "missing", 0, 7), ("e", "ok", 9, 8),
    ]  # fmt: skip
    assert "metrics are not those of the task" in records[1].reason and "metric.mcc" in records[2].reason
    assert records[3].reason == "evaluation: node left" and records[4].num_examples == 40
    assert [evaluation.metrics for evaluation in evaluations] == [METRICS, METRICS]


@pytest.mark.parametrize("error", [UpdateError("no form"), OverflowError("too large"), ValueError("odd")])
def test_totals_that_cannot_be_made_cost_no_more_than_themselves(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(kind: str, sites: list[SiteEvaluation]) -> dict[str, float]:
        raise error

    evaluations = [SiteEvaluation(9, 0.5, METRICS)]
    assert total_metrics("classification", evaluations)["accuracy"] == 0.5
    monkeypatch.setattr(metrics, "total_metrics", broken)
    assert total_metrics("classification", evaluations) == {}
