"""Which answers are let in: an update counts only after every check here."""

from __future__ import annotations

import math

import numpy as np

from giva_core.errors import UpdateError
from giva_core.metrics import total_metrics
from giva_core.protocol import Hello
from giva_core.types import Arrays, ClientUpdate, SiteEvaluation


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
    _check_counts(update.num_examples, hello.num_train, "training")
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
    if not math.isfinite(update.train_loss):
        raise UpdateError("the training loss is not finite", got=update.train_loss)
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


def check_sketch_counts(num_examples: int, loss: float, hello: Hello) -> None:
    """Refuse a sketch whose example count or loss cannot be."""
    _check_counts(num_examples, hello.num_train, "calibration")
    if not math.isfinite(loss):
        raise UpdateError("the calibration loss is not finite", got=loss)


def check_evaluation(evaluation: SiteEvaluation, hello: Hello, kind: str) -> None:
    """Refuse an evaluation whose numbers cannot be, or whose counts do not add up."""
    _check_counts(evaluation.num_examples, hello.num_eval, "evaluation")
    numbers = [evaluation.loss, *evaluation.metrics.values()]
    if not all(math.isfinite(number) for number in numbers):
        raise UpdateError("the evaluation is not finite", got=numbers)
    if not all(array.dtype.kind in "iuf" and np.isfinite(array).all() for array in evaluation.counts.values()):
        raise UpdateError("the evaluation's counts are not finite numbers")
    try:
        total_metrics(kind, [evaluation])
    except (ArithmeticError, ValueError) as error:  # moments so large that their squares overflow
        raise UpdateError("the evaluation's counts cannot be", got=error) from None


def _check_counts(num_examples: int, limit: int, what: str) -> None:
    if not 1 <= num_examples <= limit:
        raise UpdateError(
            f"the number of {what} examples cannot be",
            got=num_examples,
            expected=f"1 to {limit}, as the site said when it joined",
        )


def _short(digest: str) -> str:
    return f"{digest[:12]}…" if digest else "none"
