"""The plan of the federated calibration: which sketch each pass takes, from what, and in which shape it travels.

The bases need the top right singular subspace of the federation's gradient `G (d_out, d_in)` without `G` leaving a
site. What travels is linear in `G`, so the server's weighted mean of the sites' sketches is the sketch of the mean:

    range        Y = Gᵀ Ω     Ω from the shared seed
    left         Z = G Q      Q = orth(Y)       } one power pass
    right        Y = Gᵀ P     P = orth(Z)       }
    coordinates  Z = G A'ᵀ    only for inits that need B from the gradient

The randomized range finder and its power iteration are Halko, Martinsson & Tropp, arXiv:0909.4061, algorithms 4.3 and
4.4; the federation of it is this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import bases
from .config import GivaConfig
from .errors import BasesError
from .types import LayerShape, QuantisedSketch

Sketches = Mapping[str, QuantisedSketch]


@dataclass(frozen=True)
class Stage:
    """One pass over the calibration batches.

    Attributes:
        name: `range`, `left`, `right` or `coordinates`.
        side: `output`: the result is `Gᵀ M (d_in, q)` for a multiplier `M (d_out, q)`; `input`: `G M (d_out, q)` for
            a multiplier `M (d_in, q)`.
    """

    name: str
    side: str


OnePass = Callable[[int, Stage, tuple[Stage, Sketches] | None], Sketches]

STAGES = {
    "range": Stage("range", "output"),
    "left": Stage("left", "input"),
    "right": Stage("right", "output"),
    "coordinates": Stage("coordinates", "input"),
}


def stages(config: GivaConfig) -> tuple[Stage, ...]:
    """The passes that `config` asks for, in order; none where the bases are random."""
    if config.bases == "random":
        return ()
    names = ["range", *["left", "right"] * config.power_passes]
    if config.init != "rand":
        names.append("coordinates")
    return tuple(STAGES[name] for name in names)


def run_passes(config: GivaConfig, one_pass: OnePass) -> tuple[Sketches, Sketches | None]:
    """Carry out the plan with whatever takes and averages the sketches.

    Args:
        config: The adapter's settings.
        one_pass: Given the pass's number (from 1), its stage and the stage before with its aggregate, returns the
            aggregate of this stage.

    Returns:
        `Y`, the last aggregate of side `output`, empty without a pass; and `Z = G A'ᵀ`, where the init asks for it.
    """
    previous: tuple[Stage, Sketches] | None = None
    last: dict[str, Sketches] = {}
    for number, stage in enumerate(stages(config), start=1):
        aggregate = one_pass(number, stage, previous)
        last["coordinates" if stage.name == "coordinates" else stage.side] = aggregate
        previous = stage, aggregate
    return last.get("output", {}), last.get("coordinates")


def width(stage: Stage, layer: LayerShape, r: int, config: GivaConfig) -> int:
    """Columns of the layer's sketch in this stage."""
    if stage.name == "coordinates":
        return bases.coordinate_rank(config, layer, r)
    return config.sketch_width(r, min(layer.d_out, layer.d_in))


def sketch_shapes(
    stage: Stage, layers: Sequence[LayerShape], ranks: Sequence[int], config: GivaConfig
) -> dict[str, tuple[int, int]]:
    """Shape by layer of what a site returns in this stage: `(d_in, q)` or `(d_out, q)`."""
    return {
        layer.name: (layer.d_in if stage.side == "output" else layer.d_out, width(stage, layer, r, config))
        for layer, r in zip(layers, ranks, strict=True)
    }


def multipliers(
    stage: Stage,
    layers: Sequence[LayerShape],
    ranks: Sequence[int],
    config: GivaConfig,
    previous: Sketches | None,
) -> dict[str, np.ndarray]:
    """The matrix that each layer's gradient is multiplied with, float32, the same bytes at every site.

    Args:
        stage: The pass to prepare.
        layers: The adapted layers.
        ranks: Their effective ranks.
        config: The run's adapter settings.
        previous: The aggregate of the stage before, as broadcast; `None` for `range`.

    Raises:
        BasesError: `previous` is missing, or lacks a layer.
    """
    if stage.name == "range":
        made = [
            bases.projection(config.seed, layer, width(stage, layer, r, config))
            for layer, r in zip(layers, ranks, strict=True)
        ]
    elif previous is None or any(layer.name not in previous for layer in layers):
        raise BasesError(
            f"calibration pass '{stage.name}' has no aggregate to start from", cause="a message out of order"
        )
    else:
        sketches = [previous[layer.name] for layer in layers]
        if stage.name == "coordinates":
            rows = [bases.coordinate_rank(config, layer, r) for layer, r in zip(layers, ranks, strict=True)]
            made = [A.T for A in bases.row_spaces(layers, sketches, rows)]
        else:
            made = bases.range_bases(layers, sketches)
    return {layer.name: matrix for layer, matrix in zip(layers, made, strict=True)}
