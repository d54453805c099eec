"""The guard: one refusal for every fault, and nothing refused that is sound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from giva_core.errors import UpdateError
from giva_core.protocol import Hello
from giva_core.types import ClientUpdate, ModelSchema, SiteEvaluation
from server.guard import check_evaluation, check_sketch_counts, check_update

HELLO = Hello("site-a", 40, 9, ModelSchema((), (), {}), "m", "s", "c", "v", "cpu")
DIGEST = "ab" * 32
START = {"l.lambda_o": np.array([1.0, 2.0], np.float32), "head": np.zeros((1, 3), np.float32)}
UPDATE = ClientUpdate(
    # changed by (3, 0) and (0, 4, 0): the norm is 5
    {"l.lambda_o": np.array([4.0, 2.0], np.float32), "head": np.array([[0.0, 4.0, 0.0]], np.float32)},
    num_examples=40,
    num_steps=3,
    train_loss=0.5,
    bases_digest=DIGEST,
)


def check(max_norm: float = 0.0, **changes: Any) -> None:
    check_update(replace(UPDATE, **changes), HELLO, START, DIGEST, max_norm)


@pytest.mark.parametrize("changes", [{}, {"num_examples": 1}, {"max_norm": 5.0}, {"arrays": {"head": START["head"]}}])
def test_sound_updates_pass(changes: dict[str, Any]) -> None:
    before = {name: array.copy() for name, array in UPDATE.arrays.items()}
    check(**changes)
    assert all(np.array_equal(before[name], UPDATE.arrays[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_examples": 0}, "number of training examples cannot be; got 0; expected 1 to 40"),
        ({"num_examples": 41}, "number of training examples cannot be; got 41"),
        ({"num_examples": -1}, "number of training examples"),
        ({"num_steps": 0}, "number of training steps cannot be; got 0"),
        ({"bases_digest": "cd" * 32}, "other bases; got cdcdcdcdcdcd…; expected abababababab…"),
        ({"bases_digest": ""}, "other bases; got none"),
        ({"train_loss": float("nan")}, "loss is not finite"),
        ({"train_loss": float("inf")}, "loss is not finite"),
        ({"max_norm": 4.9}, "change is too large; got 5; expected <= 4.9"),
    ],
)
def test_each_refusal(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UpdateError, match=match):
        check(**changes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_arrays_are_finite(value: float) -> None:
    arrays = {name: array.copy() for name, array in UPDATE.arrays.items()}
    arrays["head"][0, 1:] = value
    with pytest.raises(UpdateError, match="'head' is not finite; got 2 NaN or infinite numbers"):
        check(arrays=arrays)


def test_norm_of_large_numbers_does_not_overflow() -> None:
    arrays = {"head": np.full((1, 3), 3e38, np.float32)}
    check(arrays=arrays)
    with pytest.raises(UpdateError, match="too large"):
        check(arrays=arrays, max_norm=1e30)


def test_run_without_bases_wants_updates_without() -> None:
    check_update(replace(UPDATE, bases_digest=""), HELLO, START, "", 0.0)
    with pytest.raises(UpdateError, match="expected none"):
        check_update(UPDATE, HELLO, START, "", 0.0)


@pytest.mark.parametrize(
    ("count", "loss", "match"),
    [(0, 0.5, "calibration examples"), (41, 0.5, "1 to 40"), (3, float("nan"), "calibration loss is not finite")],
)
def test_sketch_counts(count: int, loss: float, match: str) -> None:
    check_sketch_counts(40, 0.5, HELLO)
    with pytest.raises(UpdateError, match=match):
        check_sketch_counts(count, loss, HELLO)


COUNTS = {"tp": np.array([4, 1]), "predicted": np.array([6, 3]), "actual": np.array([5, 4])}
EVALUATION = SiteEvaluation(9, 0.5, {"accuracy": 5 / 9, "macro_f1": 0.5, "mcc": 0.0}, COUNTS)


def test_sound_evaluations_pass() -> None:
    check_evaluation(EVALUATION, HELLO, "classification")
    check_evaluation(replace(EVALUATION, counts={}, num_examples=1), HELLO, "classification")
    assert set(EVALUATION.counts) == set(COUNTS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_examples": 10, "counts": {}}, "number of evaluation examples cannot be; got 10; expected 1 to 9"),
        ({"num_examples": 0}, "number of evaluation examples"),
        ({"loss": float("inf")}, "evaluation is not finite"),
        ({"metrics": {"accuracy": float("nan")}}, "evaluation is not finite"),
        ({"num_examples": 8}, "counts do not add up"),
        ({"counts": {"tp": COUNTS["tp"]}}, "do not have the same form"),
        ({"counts": {**COUNTS, "tp": np.array([np.nan, 1.0])}}, "counts are not finite"),
        ({"counts": {**COUNTS, "tp": np.array(["4", "1"])}}, "counts are not finite"),
    ],
)
def test_each_refusal_of_an_evaluation(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UpdateError, match=match):
        check_evaluation(replace(EVALUATION, **changes), HELLO, "classification")


def test_moments_that_overflow_are_refused() -> None:
    evaluation = SiteEvaluation(9, 0.5, {"pearson": 0.5}, {"moments": np.array([9, 1e300, 0, 1, 1, 1])})
    with pytest.raises(UpdateError, match="counts cannot be"):
        check_evaluation(evaluation, HELLO, "regression")


def test_site_without_evaluation_rows_cannot_report_any() -> None:
    with pytest.raises(UpdateError, match="1 to 0"):
        check_evaluation(EVALUATION, replace(HELLO, num_eval=0), "classification")
