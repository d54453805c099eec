from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as reference

from giva_core.errors import DataError, NumericsError, UpdateError
from giva_core.metrics import classification_counts, from_counts, main_metric, site_metrics, total_metrics, without_few
from giva_core.types import SiteEvaluation

SIZES = (23, 7, 41)
NUM_CLASSES = 5


def examples(kind, n, rng):
    if kind == "classification":
        return rng.normal(size=(n, NUM_CLASSES)), rng.integers(0, NUM_CLASSES - 1, n)  # the last class never occurs
    if kind == "multilabel":
        return rng.normal(size=(n, NUM_CLASSES)), (rng.random((n, NUM_CLASSES)) < 0.3).astype(np.float32)
    labels = rng.normal(size=n)
    return (labels + rng.normal(size=n))[:, None], labels


def expected(kind, outputs, labels):
    if kind == "classification":
        predicted = outputs.argmax(-1)
        return {
            "accuracy": reference.accuracy_score(labels, predicted),
            "macro_f1": reference.f1_score(labels, predicted, average="macro"),
            "mcc": reference.matthews_corrcoef(labels, predicted),
        }
    if kind == "multilabel":
        predicted = outputs > 0
        return {
            "micro_f1": reference.f1_score(labels, predicted, average="micro"),
            "macro_f1": reference.f1_score(labels, predicted, average="macro"),
            "subset_accuracy": reference.accuracy_score(labels, predicted),
        }
    return {
        "pearson": np.corrcoef(outputs[:, 0], labels)[0, 1],
        "mse": reference.mean_squared_error(labels, outputs[:, 0]),
    }


def federation(kind, *, counts):
    rng = np.random.default_rng(0)
    parts = [examples(kind, n, rng) for n in SIZES]
    sites = []
    for outputs, labels in parts:
        metrics, found = site_metrics(kind, outputs, labels)
        sites.append(SiteEvaluation(len(labels), 0.0, metrics, found if counts else {}))
    return sites, np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_site_metrics_are_scikit_learns(kind):
    outputs, labels = examples(kind, 53, np.random.default_rng(1))
    assert site_metrics(kind, outputs, labels)[0] == pytest.approx(expected(kind, outputs, labels), abs=1e-12)


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_totals_from_counts_are_those_of_all_examples(kind):
    sites, outputs, labels = federation(kind, counts=True)
    totals = total_metrics(kind, sites)
    worst = totals.pop(f"worst_{main_metric(kind)}")
    assert totals == pytest.approx(expected(kind, outputs, labels), abs=1e-12)
    assert worst == min(site.metrics[main_metric(kind)] for site in sites)
    assert total_metrics(kind, sites[::-1]) == total_metrics(kind, sites)


@pytest.mark.parametrize(
    ("kind", "exact", "names"),
    [
        ("classification", "accuracy", {"accuracy", "mean_site_macro_f1", "mean_site_mcc", "worst_accuracy"}),
        (
            "multilabel",
            "subset_accuracy",
            {"subset_accuracy", "mean_site_macro_f1", "mean_site_micro_f1", "worst_micro_f1"},
        ),
        ("regression", "mse", {"mse", "mean_site_pearson", "worst_pearson"}),
    ],
)
def test_without_counts_only_exact_means_keep_their_name(kind, exact, names):
    sites, outputs, labels = federation(kind, counts=False)
    totals = total_metrics(kind, sites)
    assert totals.keys() == names
    assert totals[exact] == pytest.approx(expected(kind, outputs, labels)[exact])
    partly, _, _ = federation(kind, counts=True)
    assert total_metrics(kind, [partly[0], *sites[1:]]).keys() == names


def test_sites_without_examples_do_not_count():
    sites, _, _ = federation("classification", counts=True)
    metrics, counts = site_metrics("classification", np.zeros((0, NUM_CLASSES)), np.zeros(0, int))
    assert metrics == {} and counts["actual"].tolist() == [0] * NUM_CLASSES
    empty = SiteEvaluation(0, 0.0, metrics, counts)
    assert total_metrics("classification", [*sites, empty]) == total_metrics("classification", sites)
    assert total_metrics("classification", [empty]) == total_metrics("classification", []) == {}


def test_a_metric_that_a_site_keeps_to_itself_is_no_total():
    open_site, closed = SiteEvaluation(10, 0.5, {"accuracy": 0.5, "mcc": 0.25}), SiteEvaluation(30, 0.5, {"mcc": 0.75})
    totals = total_metrics("classification", [open_site, closed])
    assert totals == {"mean_site_accuracy": 0.5, "mean_site_mcc": 0.625, "worst_accuracy": 0.5}


def test_undefined_values_are_zero():
    one_class = site_metrics("classification", np.eye(3)[[1, 1]], np.array([1, 1]))[0]
    assert one_class == {"accuracy": 1.0, "macro_f1": 1.0, "mcc": 0.0}
    constant = site_metrics("regression", np.full(4, 2.0), np.arange(4.0))[0]
    assert constant == {"pearson": 0.0, "mse": 1.5}
    nothing = site_metrics("multilabel", -np.ones((2, 3)), np.zeros((2, 3)))[0]
    assert nothing == {"micro_f1": 0.0, "macro_f1": 0.0, "subset_accuracy": 1.0}


def test_pearson_survives_a_large_offset():
    rng = np.random.default_rng(2)
    labels = rng.normal(size=300)
    outputs = labels + rng.normal(size=300)
    shifted = [
        SiteEvaluation(len(part), 0.0, *site_metrics("regression", outputs[part] + 1e8, labels[part] + 1e8))
        for part in np.array_split(np.arange(300), 4)
    ]
    assert total_metrics("regression", shifted)["pearson"] == pytest.approx(
        np.corrcoef(outputs, labels)[0, 1], abs=1e-7
    )


def test_counts_take_predictions_as_well_as_logits():
    logits, labels = examples("classification", 31, np.random.default_rng(3))
    from_logits = classification_counts(logits, labels, NUM_CLASSES)
    from_classes = classification_counts(logits.argmax(-1), labels, NUM_CLASSES)
    for key, value in from_logits.items():
        np.testing.assert_array_equal(value, from_classes[key])
    assert from_counts("classification", from_logits)["accuracy"] == (logits.argmax(-1) == labels).mean()


def test_bad_input_is_refused():
    with pytest.raises(NumericsError, match="not finite"):
        site_metrics("classification", np.array([[np.nan, 1.0]]), np.array([0]))
    with pytest.raises(DataError, match="labels"):
        site_metrics("classification", np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(DataError, match="one row"):
        site_metrics("multilabel", np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(DataError, match="one number"):
        site_metrics("regression", np.zeros(2), np.zeros(3))


def test_counts_that_do_not_fit_are_refused():
    sites, _, _ = federation("classification", counts=True)
    wider = {key: np.append(value, 0) for key, value in sites[0].counts.items()}
    with pytest.raises(UpdateError, match="same form"):
        total_metrics("classification", [sites[1], SiteEvaluation(SIZES[0], 0.0, sites[0].metrics, wider)])
    with pytest.raises(UpdateError, match="add up"):
        total_metrics("classification", [SiteEvaluation(SIZES[0] + 1, 0.0, sites[0].metrics, sites[0].counts)])
    with pytest.raises(UpdateError, match="same form"):
        total_metrics("regression", sites)


# -- answers ----------------------------------------------------------------------------------------------------------

#: −log p, tokens, right tokens; matched, generated; chosen rightly, had a choice.
JUDGED = np.array([[2.0, 4, 1, 1, 1, 0, 0], [1.0, 1, 1, 0, 1, 1, 1], [5.0, 3, 0, 0, 0, 0, 1]])


def test_answers_are_counted_by_token_and_by_example():
    values, counts = site_metrics("causal-lm", JUDGED, np.full(3, -1))
    assert values == pytest.approx(
        {"token_accuracy": 2 / 8, "perplexity": np.e, "exact_match": 1 / 2, "choice_accuracy": 1 / 2}
    )
    np.testing.assert_array_equal(counts["answers"], [3, 8, 8, 2, 1, 2, 1, 2])
    plain, _ = site_metrics("causal-lm", JUDGED * [1, 1, 1, 0, 0, 0, 0], np.full(3, -1))
    assert plain.keys() == {"token_accuracy", "perplexity"}
    assert site_metrics("causal-lm", JUDGED[:0], np.zeros(0))[0] == {}


def test_answers_of_all_sites_are_exact_from_sums_and_means_without():
    whole, _ = site_metrics("causal-lm", JUDGED, np.full(3, -1))
    parts = [site_metrics("causal-lm", part, np.full(len(part), -1)) for part in (JUDGED[:1], JUDGED[1:])]
    sites = [SiteEvaluation(n, 0.5, *part) for n, part in zip((1, 2), parts, strict=True)]
    worst = min(site.metrics["token_accuracy"] for site in sites)
    assert total_metrics("causal-lm", sites) == pytest.approx({**whole, "worst_token_accuracy": worst})
    silent = [SiteEvaluation(site.num_examples, 0.5, site.metrics) for site in sites]
    assert total_metrics("causal-lm", silent).keys() == {
        "mean_site_perplexity", "mean_site_token_accuracy", "mean_site_exact_match", "mean_site_choice_accuracy",
        "worst_token_accuracy",
    }  # fmt: skip


def test_what_few_examples_stand_behind_can_be_taken_out():
    _, counts = site_metrics("causal-lm", JUDGED, np.full(3, -1))
    assert from_counts("causal-lm", without_few("causal-lm", counts, 2)).keys() == {
        "token_accuracy", "perplexity", "exact_match", "choice_accuracy",
    }  # fmt: skip
    few = without_few("causal-lm", counts, 3)
    assert from_counts("causal-lm", few).keys() == {"token_accuracy", "perplexity"}
    assert counts["answers"][5] == 2  # the original is as it was
