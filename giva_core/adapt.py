"""Bases for any torch model on one machine: calibrate and build, without a federation and without transformers.

The same passes, quantisation and exact arithmetic as in a federation of one site, so the digest is the same as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from . import bases, calibration
from .calibration import Sketches, Stage
from .config import GivaConfig
from .inject import layer_shapes
from .sketch import LossFunction, sketch_pass
from .types import BasesSet

if TYPE_CHECKING:
    from torch import nn


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    config: GivaConfig,
    *,
    exclude: Collection[str] = (),
) -> BasesSet:
    """Sketch the gradient of `model` on `batches` and build the bases from it.

        A (r, d_in) = top right singular vectors of G;   B (d_out, r) as `config.init` says

    Args:
        model: The model at its starting weights; it is left as it was.
        batches: The calibration batches, iterated once for each pass: a list, not a generator.
        loss_fn: Returns the SUM of the losses of a batch's examples, and their number.
        config: Rank, targets, init, seed, power passes.
        exclude: Modules that are no targets: the head.

    Returns:
        The bases of every target, ready for `inject_adapters`.

    Raises:
        TargetError: The targets match nothing, or cannot be adapted.
        BasesError: The gradient has too low a rank.
        NumericsError: The loss or a sketch is not finite.
    """
    layers, ranks = layer_shapes(model, config, exclude)
    examples = list(batches)

    def one_pass(number: int, stage: Stage, previous: tuple[Stage, Sketches] | None) -> Sketches:
        multipliers = calibration.multipliers(stage, layers, ranks, config, previous[1] if previous else None)
        found = sketch_pass(model, layers, multipliers, stage.side, examples, loss_fn)
        own = {name: bases.quantise(array, config.sketch_bits) for name, array in found.arrays.items()}
        return {
            name: bases.mean_sketch([sketch], [found.num_examples], config.sketch_bits) for name, sketch in own.items()
        }

    sketches, coordinates = calibration.run_passes(config, one_pass)
    return bases.build_bases(layers, ranks, sketches, config, coordinates)
