"""Singular vectors of the frozen weights, the same bits on every machine, for methods that start from them.

LAPACK's SVD differs from CPU to CPU in its last bits. The way that leads from a gradient to GiVA's bases (`bases`) is
exact everywhere, and asks for nothing but products with a matrix: here that matrix is W, its products are exact, and
nothing travels, for every site has the same W.

    Y = Wᵀ Ω;   Q = orth(Y), P = orth(W Q), Y = Wᵀ P, and so on;   Z = W A'ᵀ = U S Rᵀ,   V = A'ᵀ R

The randomised subspace iteration is Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4. It finds the leading
singular vectors as far as the spectrum has gaps; where it has none, no other choice of vectors is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .. import bases, calibration, exact
from ..calibration import Sketches, Stage
from ..config import GivaConfig
from ..types import BasesSet, LayerShape

_BITS = 20  # of W's entries and of the sketches; exact up to 2^15 rows, and finer than bfloat16 by far
_POWER_PASSES = 4
_OVERSAMPLING = 32


def weight_bases(
    layers: Sequence[LayerShape], ranks: Sequence[int], weights: Mapping[str, np.ndarray], seed: int
) -> tuple[BasesSet, dict[str, np.ndarray]]:
    """The r leading singular triplets of every layer's weight: `W ≈ B diag(S) A`.

    Args:
        layers: The layers.
        ranks: Singular vectors of each.
        weights: W `(d_out, d_in)` by layer name.
        seed: The shared seed, from which the iteration starts.

    Returns:
        A `(r, d_in)` and B `(d_out, r)` of every layer, and S `(r,)`, float32, by layer name.

    Raises:
        BasesError: A weight has a lower rank.
        NumericsError: A weight is not finite.
    """
    settings = GivaConfig(
        rank=max(ranks), init="topsv", seed=seed, oversampling=_OVERSAMPLING, power_passes=_POWER_PASSES
    )
    settings = replace(settings, sketch_bits=_BITS)
    integers = {layer.name: exact.quantise(weights[layer.name].reshape(-1, 1), _BITS) for layer in layers}

    def one_pass(number: int, stage: Stage, previous: tuple[Stage, Sketches] | None) -> Sketches:
        multipliers = calibration.multipliers(stage, layers, ranks, settings, previous[1] if previous else None)
        found = {}
        for layer in layers:
            codes, exponent = integers[layer.name]
            W = codes.reshape(layer.d_out, layer.d_in)
            product = exact.multiply(W.T if stage.side == "output" else W, multipliers[layer.name])
            found[layer.name] = bases.quantise(np.ldexp(product, exponent), _BITS)
        return found

    sketches, coordinates = calibration.run_passes(settings, one_pass)
    made = bases.build_bases(layers, ranks, sketches, settings, coordinates)
    Z = [coordinates[layer.name] for layer in layers] if coordinates else []
    factors = exact.orthonormalise_all([(sketch.codes, sketch.exponents) for sketch in Z])
    return made, {
        layer.name: factor.singular_values[:r].astype(np.float32)
        for layer, factor, r in zip(layers, factors, ranks, strict=True)
    }
