"""Which answers are let in: an update counts only after every check here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np

from giva_core.config import GivaConfig, TaskConfig
from giva_core.errors import UpdateError
from giva_core.metrics import ANSWERS, family, metric_names, site_metrics
from giva_core.protocol import Hello
from giva_core.types import Arrays, ClientUpdate, SiteEvaluation

_LARGEST_LOSS = float(np.finfo(np.float32).max)
#: Outputs and labels are float32, so no sum of their squares over a site's examples comes near this.
_LARGEST_MOMENT = 1e100
#: Where a metric can lie, if not between -1 and 1.
_RANGES = {"mse": (0.0, math.inf), "perplexity": (1.0, 1e30)}


def check_update(update: ClientUpdate, hello: Hello, start: Arrays, bases_digest: str, max_norm: float) -> None:
    """Refuse an update that must not be averaged.

    Args:
        update: The site's update, its shapes already fitted to the schema.
        hello: What the site said of itself.
        start: The global arrays it started from.
        bases_digest: The run's bases; empty where there are none.
        max_norm: Largest `‖update − start‖₂` over all arrays; 0 for no limit.

    Raises:
        UpdateError: Naming the first fault found.
    """
    # all of a site's examples are its weight, whatever share of them a round takes
    _check_count(update.num_examples, hello.num_train, hello.num_train, "training")
    if not 1 <= update.num_steps < 2**31:
        raise UpdateError("the number of training steps cannot be", got=update.num_steps, expected="at least 1")
    if update.bases_digest != bases_digest:
        raise UpdateError(
            "the update was trained on other bases",
            got=_short(update.bases_digest),
            expected=_short(bases_digest),
            cause="the site kept bases of an earlier run",
            remedy="restart it with an empty cache folder",
        )
    _check_loss(update.train_loss, "training")
    if not 0 <= update.seconds < math.inf:
        raise UpdateError("the training time cannot be", got=update.seconds)
    squares = 0.0
    for name, array in update.arrays.items():
        if not np.isfinite(array).all():
            count = int(np.size(array) - np.isfinite(array).sum())
            raise UpdateError(
                f"the array '{name}' is not finite",
                got=f"{count} NaN or infinite numbers",
                cause="the learning rate is too large for this site",
            )
        squares += float(np.sum((array.astype(np.float64) - start[name]) ** 2))
    if max_norm and math.sqrt(squares) > max_norm:
        raise UpdateError(
            "the update's change is too large", got=f"{math.sqrt(squares):.4g}", expected=f"<= {max_norm:g}"
        )


def check_sketch_counts(num_examples: int, loss: float, hello: Hello, giva: GivaConfig) -> None:
    """Refuse a sketch whose example count or loss cannot be."""
    limit = min(hello.num_train, giva.calibration_batches * giva.calibration_batch_size)
    _check_count(num_examples, 1, limit, "calibration")
    _check_loss(loss, "calibration")


# -- evaluation -------------------------------------------------------------------------------------------------------


def check_evaluation(evaluation: SiteEvaluation, hello: Hello, task: TaskConfig) -> None:
    """Refuse an evaluation whose numbers cannot be, or whose counts do not add up.

    It has metrics of its kind of task, all of them or those that its site lets out; and counts only of exactly the
    kind's form, and only where the run shares them.

    Raises:
        UpdateError: Naming the first fault found.
    """
    names, shapes = _form(task.kind, max(1, len(task.labels)))
    n = evaluation.num_examples
    _check_count(n, 1, hello.num_eval, "evaluation")
    _check_loss(evaluation.loss, "evaluation")
    if not evaluation.metrics.keys() <= names:
        raise UpdateError(
            "the evaluation's metrics are not those of the task", got=sorted(evaluation.metrics), expected=sorted(names)
        )
    for name, value in evaluation.metrics.items():
        low, high = _RANGES.get(name, (-1.0, 1.0))
        if not (math.isfinite(value) and low <= value <= high):
            raise UpdateError(f"the metric '{name}' cannot be", got=value, expected=f"{low:g} to {high:g}")
    if not evaluation.counts:
        return  # a site may keep its counts to itself, whatever the run shares
    if not task.share_counts:
        raise UpdateError("the evaluation has counts", expected="none, since task.share-counts is off")
    found = {name: array.shape for name, array in evaluation.counts.items()}
    if found != shapes:
        raise UpdateError("the evaluation's counts do not have the form of the task", got=found, expected=shapes)
    match family(task.kind):
        case "numbers":
            _check_moments(evaluation.counts["moments"], n)
        case "answers":
            _check_answers(evaluation.counts["answers"], n)
        case found_family:
            _check_class_counts(evaluation.counts, n, found_family == "classes")


@cache
def _form(kind: str, num_labels: int) -> tuple[frozenset[str], dict[str, tuple[int, ...]]]:
    """Names of the kind's metrics, and shape by name of its counts: those of a site without examples."""
    made_of = family(kind)
    width = {"numbers": 1, "answers": len(ANSWERS) - 1}.get(made_of, num_labels)
    outputs = np.zeros((0, width))
    labels = outputs if made_of == "sets" else np.zeros(0, np.int64)
    counts = site_metrics(kind, outputs, labels)[1]
    return frozenset(metric_names(kind)), {name: array.shape for name, array in counts.items()}


def _check_class_counts(counts: Mapping[str, np.ndarray], n: int, is_one_class_each: bool) -> None:
    for name, array in counts.items():
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > n:
            raise UpdateError(f"the counts '{name}' cannot be", expected=f"integers from 0 to {n}")
    if np.any(counts["tp"] > counts["actual"]) or np.any(counts["tp"] > counts["predicted"]):
        raise UpdateError("the evaluation's counts cannot be", cause="more right answers than answers or examples")
    if is_one_class_each:
        sums = int(counts["actual"].sum()), int(counts["predicted"].sum())
    else:
        sums = int(counts["examples"][0]), n
    if sums != (n, n):
        raise UpdateError("the evaluation's counts do not add up", got=sums, expected=n)


def _check_moments(moments: np.ndarray, n: int) -> None:
    if moments.dtype.kind != "f" or not np.all(np.abs(moments) <= _LARGEST_MOMENT):
        raise UpdateError("the evaluation's moments cannot be", expected=f"floats up to {_LARGEST_MOMENT:g}")
    if moments[0] != n:
        raise UpdateError("the evaluation's counts do not add up", got=float(moments[0]), expected=n)
    if moments[3] < 0 or moments[4] < 0:
        raise UpdateError("the evaluation's moments cannot be", cause="a sum of squares below 0")


def _check_answers(sums: np.ndarray, n: int) -> None:
    if sums.dtype.kind != "f" or not np.all((sums >= 0) & (sums <= _LARGEST_MOMENT)):
        raise UpdateError("the evaluation's sums cannot be", expected=f"floats from 0 to {_LARGEST_MOMENT:g}")
    of = dict(zip(ANSWERS, sums.tolist(), strict=True))
    if of["examples"] != n:
        raise UpdateError("the evaluation's counts do not add up", got=of["examples"], expected=n)
    bounds = (("right_tokens", of["tokens"]), ("matched", of["generated"]), ("chosen", of["choices"]))
    if any(of[name] > most for name, most in (*bounds, ("generated", n), ("choices", n))) or of["tokens"] < n:
        raise UpdateError("the evaluation's sums cannot be", cause="more right answers than answers or examples")


# -- shared -----------------------------------------------------------------------------------------------------------


def _check_count(num_examples: int, low: int, high: int, what: str) -> None:
    if not low <= num_examples <= high:
        raise UpdateError(
            f"the number of {what} examples cannot be",
            got=num_examples,
            expected=f"{low} to {high}" if low != high else low,
            cause="the site said otherwise when it joined",
        )


def _check_loss(loss: float, what: str) -> None:
    if not abs(loss) <= _LARGEST_LOSS:  # false for NaN as well
        raise UpdateError(f"the {what} loss is not a finite float32", got=loss)


def _short(digest: str) -> str:
    return f"{digest[:12]}…" if digest else "none"
