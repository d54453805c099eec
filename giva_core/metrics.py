"""Metrics of a site, and of the federation: exact totals from sufficient statistics, never a mean passed off as one.

Accuracy and mean squared error of all sites together are the example-weighted means of the sites' own. Macro-F1, MCC
and Pearson's r are not. They come from counts where sites share them; else their weighted mean goes by the name
`mean_site_<metric>`. Values follow scikit-learn; undefined ones (one class only, a constant output) are 0.

| kind | metrics | counts |
|---|---|---|
| classification, image-classification | accuracy, macro_f1, mcc | tp, predicted, actual `(C,)` |
| multilabel | micro_f1, macro_f1, subset_accuracy | tp, predicted, actual `(C,)`, exact, examples `(1,)` |
| regression | pearson, mse | moments `(6,)`: n, mean x, mean y, Σ(x−x̄)², Σ(y−ȳ)², Σ(x−x̄)(y−ȳ) |
| causal-lm, seq2seq | perplexity, token_accuracy, exact_match, choice_accuracy | answers `(8,)`, sums: `ANSWERS` |

Macro-F1 is over the classes that occur in labels or outputs; for `multilabel` over all C labels. Perplexity is `exp` of
the mean −log p over answer tokens. `exact_match` is over the answers that were generated, `choice_accuracy` over the
examples with options; where there are none, the metric is not there either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .errors import DataError, NumericsError, UpdateError
from .types import SiteEvaluation

_LARGEST_LOG = 60.0  # a perplexity beyond it says no more, and would drown those of all other sites

Counts = Mapping[str, np.ndarray]

#: Metrics whose example-weighted mean over sites is the value over all examples.
MEANS = frozenset({"accuracy", "subset_accuracy", "mse"})

#: What is summed of texts that are answers, in this order: the outputs of `giva_core.models.answers` behind a count.
ANSWERS = ("examples", "minus_log_p", "tokens", "right_tokens", "matched", "generated", "chosen", "choices")

#: What each kind's metrics are made of, and their names, the main one first.
_FAMILY = {
    "classification": "classes",
    "multilabel": "sets",
    "regression": "numbers",
    "causal-lm": "answers",
    "seq2seq": "answers",
    "image-classification": "classes",
}
_KEYS = {
    "classes": {"tp", "predicted", "actual"},
    "sets": {"tp", "predicted", "actual", "exact", "examples"},
    "numbers": {"moments"},
    "answers": {"answers"},
}
_NAMES = {
    "classes": ("accuracy", "macro_f1", "mcc"),
    "sets": ("micro_f1", "macro_f1", "subset_accuracy"),
    "numbers": ("pearson", "mse"),
    "answers": ("token_accuracy", "perplexity", "exact_match", "choice_accuracy"),
}


def family(kind: str) -> str:
    """What the metrics of a kind of task are made of: `classes`, `sets`, `numbers` or `answers`."""
    return _FAMILY[kind]


def metric_names(kind: str) -> tuple[str, ...]:
    """Every metric of a kind of task, the main one first."""
    return _NAMES[_FAMILY[kind]]


def main_metric(kind: str) -> str:
    """The metric by which sites of this kind of task are compared; more is better."""
    return metric_names(kind)[0]


# -- one site ---------------------------------------------------------------------------------------------------------


def site_metrics(kind: str, outputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and counts of one site's outputs.

    Args:
        kind: A kind of task.
        outputs: Logits `(n, C)`; for regression `(n,)` or `(n, 1)`; for answers `(n, 7)`, `ANSWERS`
            without the first.
        labels: Class indices `(n,)`; zeros and ones `(n, C)`; or numbers `(n,)`. Answers are judged already.

    Returns:
        Metric by name, empty for n = 0, and the counts of the table above.

    Raises:
        NumericsError: An output is not finite.
        DataError: Labels do not fit the outputs.
    """
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if not np.isfinite(outputs).all():
        raise NumericsError(
            "the model's outputs are not finite", cause="training diverged", public="outputs are not finite"
        )
    if _FAMILY[kind] == "classes":
        counts = classification_counts(outputs, labels, outputs.shape[-1])
    elif _FAMILY[kind] == "sets":
        counts = multilabel_counts(outputs, labels)
    elif _FAMILY[kind] == "answers":
        counts = answer_sums(outputs)
    else:
        counts = regression_moments(outputs.reshape(-1), labels)
    return (from_counts(kind, counts) if len(labels) else {}), counts


def classification_counts(outputs: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Per class: right answers (`tp`), answers (`predicted`) and examples (`actual`), int64 `(C,)`.

    Args:
        outputs: Logits `(n, C)`, or predicted classes `(n,)`.
        labels: Class indices `(n,)`.
        num_classes: C.
    """
    predicted = outputs.argmax(-1) if outputs.ndim == 2 else outputs
    for name, classes in (("labels", labels), ("predictions", predicted)):
        if classes.shape != labels.shape or (classes.size and not 0 <= classes.min() <= classes.max() < num_classes):
            raise DataError(f"{name} are not one class for each example", expected=f"indices below {num_classes}")
    return {
        "tp": np.bincount(labels[predicted == labels], minlength=num_classes),
        "predicted": np.bincount(predicted, minlength=num_classes),
        "actual": np.bincount(labels, minlength=num_classes),
    }


def multilabel_counts(outputs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The same per label, which is predicted where its logit is above 0, and the examples answered `exact`ly.

    Args:
        outputs: Logits `(n, C)`.
        labels: Zeros and ones `(n, C)`.
    """
    if outputs.shape != labels.shape:
        raise DataError("labels are not one row for each example", got=labels.shape, expected=outputs.shape)
    predicted, actual = outputs > 0, labels > 0.5
    return {
        "tp": (predicted & actual).sum(0),
        "predicted": predicted.sum(0),
        "actual": actual.sum(0),
        "exact": np.array([(predicted == actual).all(-1).sum()]),
        "examples": np.array([len(labels)]),
    }


def regression_moments(outputs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Centred moments of outputs x and labels y, float64, both `(n,)`."""
    if outputs.shape != labels.shape:
        raise DataError("labels are not one number for each example", got=labels.shape, expected=outputs.shape)
    if not len(labels):
        return {"moments": np.zeros(6)}
    x, y = outputs.astype(np.float64), labels.astype(np.float64)
    dx, dy = x - x.mean(), y - y.mean()
    return {"moments": np.array([len(x), x.mean(), y.mean(), dx @ dx, dy @ dy, dx @ dy])}


def answer_sums(outputs: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over answers, float64 `(8,)`, in the order of `ANSWERS`.

    Args:
        outputs: `(n, 7)`.
    """
    return {"answers": np.array([len(outputs), *outputs.astype(np.float64).sum(0)])}


def without_few(kind: str, counts: Counts, least: int) -> dict[str, np.ndarray]:
    """The counts without what fewer than `least` examples stand behind: generations, and choices between options."""
    kept = {key: value.copy() for key, value in counts.items()}
    if _FAMILY[kind] == "answers":
        for of, among in (("matched", "generated"), ("chosen", "choices")):
            if kept["answers"][ANSWERS.index(among)] < least:
                kept["answers"][[ANSWERS.index(of), ANSWERS.index(among)]] = 0.0
    return kept


# -- counts to metrics ------------------------------------------------------------------------------------------------


def from_counts(kind: str, counts: Counts) -> dict[str, float]:
    """All metrics of a kind of task from its counts."""
    return _FROM_COUNTS[_FAMILY[kind]](counts)


def _classification(counts: Counts) -> dict[str, float]:
    tp, predicted, actual = (counts[key].astype(np.float64) for key in ("tp", "predicted", "actual"))
    n, correct = actual.sum(), tp.sum()
    # R_K, Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006: covariance of answers and truth over their deviations
    spread = (n * n - predicted @ predicted) * (n * n - actual @ actual)
    return {
        "accuracy": _ratio(correct, n),
        "macro_f1": _macro_f1(tp, predicted + actual, predicted + actual > 0),
        "mcc": _ratio(correct * n - predicted @ actual, math.sqrt(max(spread, 0.0))),
    }


def _multilabel(counts: Counts) -> dict[str, float]:
    tp, predicted, actual = (counts[key].astype(np.float64) for key in ("tp", "predicted", "actual"))
    return {
        "micro_f1": _ratio(2.0 * tp.sum(), (predicted + actual).sum()),
        "macro_f1": _macro_f1(tp, predicted + actual, np.ones(tp.shape, bool)),
        "subset_accuracy": _ratio(counts["exact"].sum(), counts["examples"].sum()),
    }


def _regression(counts: Counts) -> dict[str, float]:
    n, mean_x, mean_y, xx, yy, xy = counts["moments"].astype(np.float64)
    return {
        "pearson": float(np.clip(_ratio(xy, math.sqrt(xx) * math.sqrt(yy)), -1.0, 1.0)),
        "mse": _ratio(max(xx + yy - 2.0 * xy, 0.0), n) + float(mean_x - mean_y) ** 2,
    }


def _answers(counts: Counts) -> dict[str, float]:
    sums = dict(zip(ANSWERS, counts["answers"].astype(np.float64).tolist(), strict=True))
    found = {
        "token_accuracy": _ratio(sums["right_tokens"], sums["tokens"]),
        "perplexity": math.exp(min(_ratio(sums["minus_log_p"], sums["tokens"]), _LARGEST_LOG)),
    }
    if sums["generated"]:
        found["exact_match"] = _ratio(sums["matched"], sums["generated"])
    if sums["choices"]:
        found["choice_accuracy"] = _ratio(sums["chosen"], sums["choices"])
    return found


_FROM_COUNTS: dict[str, Callable[[Counts], dict[str, float]]] = {
    "classes": _classification,
    "sets": _multilabel,
    "numbers": _regression,
    "answers": _answers,
}


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0


def _macro_f1(tp: np.ndarray, total: np.ndarray, among: np.ndarray) -> float:
    """Mean of `F1 = 2 tp / (predicted + actual)` over the classes `among` C."""
    f1 = np.divide(2.0 * tp, total, out=np.zeros_like(total), where=total > 0)
    return float(f1[among].mean()) if among.any() else 0.0


# -- the federation ---------------------------------------------------------------------------------------------------


def total_metrics(kind: str, sites: Sequence[SiteEvaluation]) -> dict[str, float]:
    """Metrics over all sites' examples, whatever the order of the sites.

    With counts from every site all metrics are exact. Without, `accuracy`, `subset_accuracy` and `mse` still are, as
    example-weighted means, and the others become `mean_site_<metric>`. `worst_<main metric>` is the lowest of a site.
    Sites without examples do not count. A site may keep a metric to itself: what the others report becomes
    `mean_site_<metric>` over them, for it is no total.

    Raises:
        UpdateError: The sites' counts do not have the same form.
    """
    live = [site for site in sites if site.num_examples > 0]
    if not live:
        return {}
    totals: dict[str, float] = {}
    if all(site.counts for site in live):
        totals = from_counts(kind, _combined(kind, live))
    else:
        for name in sorted(set[str]().union(*(site.metrics for site in live))):
            telling = [site for site in live if name in site.metrics]
            weight = sum(site.num_examples for site in telling)
            mean = math.fsum(site.num_examples * site.metrics[name] for site in telling) / weight
            totals[name if name in MEANS and len(telling) == len(live) else f"mean_site_{name}"] = mean
    main = main_metric(kind)
    if worst := [site.metrics[main] for site in live if main in site.metrics]:
        totals[f"worst_{main}"] = min(worst)
    return totals


def _combined(kind: str, sites: Sequence[SiteEvaluation]) -> dict[str, np.ndarray]:
    """Counts of all examples. Moments: Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115, for k parts."""
    shapes = {key: value.shape for key, value in sites[0].counts.items()}
    for site in sites:
        if shapes.keys() != _KEYS[_FAMILY[kind]] or {key: value.shape for key, value in site.counts.items()} != shapes:
            raise UpdateError(
                "the sites' counts do not have the same form", cause="sites of different versions or labels"
            )
        if _examples(site.counts) != site.num_examples:
            raise UpdateError(
                "a site's counts do not add up", got=f"{_examples(site.counts):g} examples", expected=site.num_examples
            )
    if _FAMILY[kind] != "numbers":
        return {key: np.sum([site.counts[key] for site in sites], axis=0) for key in shapes}
    n, x, y, xx, yy, xy = np.stack([site.counts["moments"] for site in sites]).astype(np.float64).T
    total = math.fsum(n)
    mean_x, mean_y = math.fsum(n * x) / total, math.fsum(n * y) / total
    dx, dy = x - mean_x, y - mean_y
    sums = [
        math.fsum([*within, *between]) for within, between in ((xx, n * dx * dx), (yy, n * dy * dy), (xy, n * dx * dy))
    ]
    return {"moments": np.array([total, mean_x, mean_y, *sums])}


def _examples(counts: Counts) -> float:
    for key in ("moments", "answers"):
        if key in counts:
            return float(counts[key][0])
    return float(counts.get("examples", counts["actual"]).sum())
