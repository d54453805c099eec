"""The guard: one refusal for every fault, and nothing refused that is sound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from giva_core.config import GivaConfig, TaskConfig
from giva_core.errors import UpdateError
from giva_core.metrics import site_metrics
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


@pytest.mark.parametrize("changes", [{}, {"max_norm": 5.0}, {"arrays": {"head": START["head"]}}])
def test_sound_updates_pass(changes: dict[str, Any]) -> None:
    before = {name: array.copy() for name, array in UPDATE.arrays.items()}
    check(**changes)
    assert all(np.array_equal(before[name], UPDATE.arrays[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_examples": 0}, "number of training examples cannot be; got 0; expected 40"),
        ({"num_examples": 39}, "number of training examples cannot be; got 39"),
        ({"num_examples": 41}, "number of training examples cannot be; got 41"),
        ({"num_examples": -1}, "number of training examples"),
        ({"num_steps": 0}, "number of training steps cannot be; got 0"),
        ({"bases_digest": "cd" * 32}, "other bases; got cdcdcdcdcdcd…; expected abababababab…"),
        ({"bases_digest": ""}, "other bases; got none"),
        ({"num_steps": 2**31}, "number of training steps cannot be"),
        ({"train_loss": float("nan")}, "training loss is not a finite"),
        ({"train_loss": float("-inf")}, "training loss is not a finite"),
        ({"train_loss": 1e300}, "training loss is not a finite"),
        ({"seconds": float("nan")}, "training time cannot be"),
        ({"seconds": -1.0}, "training time cannot be"),
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


GIVA = GivaConfig(calibration_batches=2, calibration_batch_size=8)


@pytest.mark.parametrize(
    ("count", "loss", "match"),
    [
        (0, 0.5, "calibration examples"),
        (17, 0.5, "1 to 16"),
        (3, float("nan"), "calibration loss is not a finite"),
    ],
)
def test_sketch_counts(count: int, loss: float, match: str) -> None:
    check_sketch_counts(16, 0.5, HELLO, GIVA)
    with pytest.raises(UpdateError, match=match):
        check_sketch_counts(count, loss, HELLO, GIVA)


def test_a_small_site_cannot_sketch_more_than_it_has() -> None:
    with pytest.raises(UpdateError, match="1 to 5"):
        check_sketch_counts(6, 0.5, replace(HELLO, num_train=5), GIVA)


# -- evaluations ------------------------------------------------------------------------------------------------------

TASK = TaskConfig(labels=("no", "yes"), share_counts=True)
COUNTS = {"tp": np.array([4, 1]), "predicted": np.array([6, 3]), "actual": np.array([5, 4])}
METRICS = {"accuracy": 5 / 9, "macro_f1": 0.5, "mcc": -0.2}
EVALUATION = SiteEvaluation(9, 0.5, METRICS, COUNTS)
MULTILABEL = TaskConfig(kind="multilabel", labels=("x", "y", "z"), share_counts=True)
REGRESSION = TaskConfig(kind="regression", share_counts=True)
ANSWERING = TaskConfig(kind="causal-lm", share_counts=True)
MOMENTS = np.array([9.0, 1.0, 2.0, 3.0, 4.0, 1.5])


def real_evaluation(kind: str) -> SiteEvaluation:
    """What a sound site sends for nine examples."""
    rng = np.random.default_rng(0)
    if kind == "causal-lm":
        judged = np.tile([2.5, 3, 1, 1, 1, 0, 1], (9, 1))
        return SiteEvaluation(9, 0.5, *site_metrics(kind, judged, np.zeros(9)))
    shape = {"classification": (9, 2), "multilabel": (9, 3), "regression": (9,)}[kind]
    labels = {"classification": rng.integers(2, size=9), "multilabel": rng.integers(2, size=(9, 3))}
    return SiteEvaluation(9, 0.5, *site_metrics(kind, rng.normal(size=shape), labels.get(kind, rng.normal(size=9))))


@pytest.mark.parametrize("task", [TASK, MULTILABEL, REGRESSION, ANSWERING], ids=lambda task: task.kind)
def test_sound_evaluations_pass(task: TaskConfig) -> None:
    sound = real_evaluation(task.kind)
    check_evaluation(sound, HELLO, task)
    check_evaluation(replace(sound, counts={}, num_examples=1), HELLO, replace(task, share_counts=False))
    check_evaluation(replace(sound, counts={}), HELLO, task)  # a site may keep them to itself
    with pytest.raises(UpdateError, match="share-counts is off"):
        check_evaluation(sound, HELLO, replace(task, share_counts=False))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_examples": 10}, "number of evaluation examples cannot be; got 10; expected 1 to 9"),
        ({"num_examples": 0}, "number of evaluation examples"),
        ({"num_examples": 8}, "do not add up|cannot be"),
        ({"loss": float("inf")}, "evaluation loss is not a finite"),
        ({"metrics": {**METRICS, "accuracy": float("nan")}}, "metric 'accuracy' cannot be"),
        ({"metrics": {**METRICS, "mcc": -1.5}}, "metric 'mcc' cannot be"),
        ({"metrics": {**METRICS, "bleu": 0.5}}, "metrics are not those of the task"),
        ({"counts": {"tp": COUNTS["tp"]}}, "do not have the form"),
        ({"counts": {**COUNTS, "more": COUNTS["tp"]}}, "do not have the form"),
        ({"counts": {**COUNTS, "tp": np.array([4, 1, 0])}}, "do not have the form"),
        ({"counts": {**COUNTS, "tp": np.array(4)}}, "do not have the form"),
        ({"counts": {"moments": MOMENTS}}, "do not have the form"),
        ({"counts": {**COUNTS, "tp": np.array([np.nan, 1.0])}}, "'tp' cannot be"),
        ({"counts": {**COUNTS, "tp": np.array(["4", "1"])}}, "'tp' cannot be"),
        ({"counts": {**COUNTS, "tp": np.array([4j, 1])}}, "'tp' cannot be"),
        ({"counts": {**COUNTS, "tp": np.array([-1, 1])}}, "'tp' cannot be"),
        ({"counts": {**COUNTS, "actual": np.array([2**64 - 1, 10], np.uint64)}}, "'actual' cannot be"),
        ({"counts": {**COUNTS, "tp": np.array([4, 4])}}, "more right answers"),
        ({"counts": {**COUNTS, "tp": np.array([6, 1])}}, "more right answers"),
        ({"counts": {**COUNTS, "actual": np.array([5, 5])}}, "do not add up"),
    ],
)
def test_each_refusal_of_an_evaluation(changes: dict[str, Any], match: str) -> None:
    check_evaluation(EVALUATION, HELLO, TASK)
    with pytest.raises(UpdateError, match=match):
        check_evaluation(replace(EVALUATION, **changes), HELLO, TASK)


def test_a_site_may_keep_metrics_to_itself() -> None:
    for metrics in ({}, {"accuracy": 5 / 9}):
        check_evaluation(replace(EVALUATION, metrics=metrics), HELLO, TASK)


@pytest.mark.parametrize(
    ("moments", "match"),
    [
        (np.array([9, 1e300, 0, 1, 1, 1]), "moments cannot be"),
        (np.array([9, np.nan, 0, 1, 1, 1]), "moments cannot be"),
        (np.array([9, 0, 0, 1, 1, 1]), "moments cannot be"),  # integers
        (np.array([9, 0, 0, -1.0, 1, 1]), "a sum of squares below 0"),
        (np.array([8, 0, 0, 1.0, 1, 1]), "do not add up"),
        (MOMENTS[:5], "do not have the form"),
    ],
)
def test_moments_that_cannot_be(moments: np.ndarray, match: str) -> None:
    sound = SiteEvaluation(9, 0.5, {"pearson": 0.5, "mse": 7.0}, {"moments": MOMENTS})
    check_evaluation(sound, HELLO, REGRESSION)
    with pytest.raises(UpdateError, match=match):
        check_evaluation(replace(sound, counts={"moments": moments}), HELLO, REGRESSION)
    with pytest.raises(UpdateError, match="'mse' cannot be"):
        check_evaluation(replace(sound, metrics={"pearson": 0.5, "mse": -0.1}), HELLO, REGRESSION)


def test_multilabel_counts_name_their_examples() -> None:
    sound = real_evaluation("multilabel")
    with pytest.raises(UpdateError, match="do not add up"):
        check_evaluation(replace(sound, counts={**sound.counts, "examples": np.array([8])}), HELLO, MULTILABEL)


def test_site_without_evaluation_rows_cannot_report_any() -> None:
    with pytest.raises(UpdateError, match="1 to 0"):
        check_evaluation(EVALUATION, replace(HELLO, num_eval=0), TASK)


@pytest.mark.parametrize(
    ("sums", "match"),
    [
        ([8, 9, 27, 9, 9, 9, 0, 9], "do not add up"),
        ([9, 9, 8, 3, 9, 9, 0, 9], "sums cannot be"),
        ([9, 9, 27, 28, 9, 9, 0, 9], "sums cannot be"),
        ([9, 9, 27, 9, 10, 9, 0, 9], "sums cannot be"),
        ([9, 9, 27, 9, 9, 10, 0, 9], "sums cannot be"),
        ([9, 9, 27, 9, 9, 9, 9, 8], "sums cannot be"),
        ([9, -1, 27, 9, 9, 9, 0, 9], "sums cannot be"),
        ([9, float("nan"), 27, 9, 9, 9, 0, 9], "sums cannot be"),
        ([9, 9], "do not have the form"),
    ],
)
def test_sums_of_answers_that_cannot_be_are_refused(sums: list[float], match: str) -> None:
    evaluation = replace(real_evaluation("causal-lm"), counts={"answers": np.array(sums, np.float64)})
    with pytest.raises(UpdateError, match=match):
        check_evaluation(evaluation, HELLO, ANSWERING)


def test_a_perplexity_that_would_drown_all_others_is_refused() -> None:
    sound = real_evaluation("causal-lm")
    with pytest.raises(UpdateError, match="metric 'perplexity' cannot be"):
        check_evaluation(replace(sound, metrics={**sound.metrics, "perplexity": 1e300}), HELLO, ANSWERING)


def test_a_perplexity_below_one_is_refused() -> None:
    sound = real_evaluation("causal-lm")
    with pytest.raises(UpdateError, match="metric 'perplexity' cannot be"):
        check_evaluation(replace(sound, metrics={**sound.metrics, "perplexity": 0.5}), HELLO, ANSWERING)
