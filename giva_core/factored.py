"""Server-side arithmetic on LoRA's matrices: the error that their mean makes, and the residual that takes it away.

With `ΔW_k = s B_k A_k` of site k, weights w_k that add up to one, and the means `B̄ = Σ w_k B_k`, `Ā = Σ w_k A_k`,

    Σ w_k ΔW_k − s B̄ Ā = s L R,    L = [w_1 B_1 … w_K B_K, −B̄] (d_out, n),   R = [A_1; …; A_K; Ā] (n, d_in)

FedEx-LoRA (Singhal, Ponkshe and Vepakomma, arXiv:2410.09432) adds it to the frozen weight, which makes the mean exact.
There a site keeps what it was sent. Here every round begins from what the server broadcasts, so that a site may miss
rounds or be restarted: the residuals of all rounds so far travel, as factors for as long as these are smaller than the
dense matrix. Norms need no dense matrix: `‖L R‖_F² = tr((LᵀL)(R Rᵀ))`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .types import Arrays, ModelSchema

INSIDE_A, INSIDE_B = ".lora_A.default.weight", ".lora_B.default.weight"
DENSE, FACTOR_A, FACTOR_B = "residual", "residual_A", "residual_B"
_ALL_DENSE = 2**31 - 1


@dataclass(frozen=True)
class LoraPair:
    """One layer's matrices by name, and the layer's size."""

    layer: str
    d_out: int
    d_in: int

    @property
    def A(self) -> str:
        """Name of `A (r, d_in)`."""
        return self.layer + INSIDE_A

    @property
    def B(self) -> str:
        """Name of `B (d_out, r)`."""
        return self.layer + INSIDE_B

    def is_dense(self, columns: int) -> bool:
        """Whether a residual of so many columns is smaller as one matrix than as two factors."""
        return columns * (self.d_out + self.d_in) >= self.d_out * self.d_in


def lora_pairs(shapes: Mapping[str, tuple[int, ...]]) -> tuple[LoraPair, ...]:
    """The layers whose A and B are both among the arrays, in their order."""
    layers = (name.removesuffix(INSIDE_A) for name in shapes if name.endswith(INSIDE_A))
    return tuple(
        LoraPair(layer, shapes[layer + INSIDE_B][0], shapes[layer + INSIDE_A][1])
        for layer in layers
        if layer + INSIDE_B in shapes
    )


def mean_factors(
    pair: LoraPair, updates: Sequence[Arrays], weights: Sequence[int], mean: Arrays
) -> tuple[np.ndarray, np.ndarray]:
    """`L (d_out, n)` and `R (n, d_in)`, float64, as above without the scale s."""
    total = float(sum(weights))
    columns = [update[pair.B].astype(np.float64) * (w / total) for update, w in zip(updates, weights, strict=True)]
    rows = [update[pair.A].astype(np.float64) for update in updates]
    return np.hstack([*columns, -mean[pair.B].astype(np.float64)]), np.vstack([*rows, mean[pair.A].astype(np.float64)])


def aggregation_error(
    pairs: Sequence[LoraPair], updates: Sequence[Arrays], weights: Sequence[int], mean: Arrays
) -> float:
    """`‖Σ w_k ΔW_k − s B̄ Ā‖_F / ‖Σ w_k ΔW_k‖_F` over all layers; 0 where no site moved."""
    missed = size = 0.0
    for pair in pairs:
        L, R = mean_factors(pair, updates, weights, mean)
        r = mean[pair.A].shape[0]
        missed += _square(L, R)
        size += _square(L[:, :-r], R[:-r])
    return math.sqrt(missed / size) if size > 0 else 0.0


def grown_residual(
    pairs: Sequence[LoraPair],
    residual: Arrays,
    updates: Sequence[Arrays],
    weights: Sequence[int],
    mean: Arrays,
    scale: float,
) -> Arrays:
    """The residual of the rounds so far and of this one, float32.

    Args:
        pairs: The adapted layers.
        residual: What was kept so far; empty in the first round.
        updates: The sites' arrays, A and B of every layer included.
        weights: Training examples of each site.
        mean: The arrays that the server broadcasts next.
        scale: LoRA's alpha / r.

    Returns:
        By layer, `residual_B (d_out, n)` and `residual_A (n, d_in)`, or `residual (d_out, d_in)` where that is smaller.
    """
    if len(updates) == 1:
        return dict(residual)  # one site's mean is its update: nothing is lost, not even by rounding
    grown: Arrays = {}
    for pair in pairs:
        L, R = mean_factors(pair, updates, weights, mean)
        dense, columns, rows = (residual.get(f"{pair.layer}.{kind}") for kind in (DENSE, FACTOR_B, FACTOR_A))
        if columns is not None and rows is not None:
            L, R = np.hstack([columns / scale, L]), np.vstack([rows, R])
        if dense is None and not pair.is_dense(L.shape[1]):
            grown[f"{pair.layer}.{FACTOR_B}"] = (scale * L).astype(np.float32)
            grown[f"{pair.layer}.{FACTOR_A}"] = R.astype(np.float32)
            continue
        added = scale * (L @ R)
        grown[f"{pair.layer}.{DENSE}"] = (added if dense is None else dense + added).astype(np.float32)
    return grown


def is_residual(name: str) -> bool:
    """Whether an array is a residual, of whatever method."""
    return name.rpartition(".")[2] in (DENSE, FACTOR_A, FACTOR_B)


def residual_columns(arrays: Mapping[str, np.ndarray]) -> int:
    """The number n that tells the residual's shapes: 0 without one; a very large number where no layer has factors."""
    found = [name for name in arrays if is_residual(name)]
    factors = [name for name in found if name.endswith(f".{FACTOR_B}")]
    return int(arrays[factors[0]].shape[1]) if factors else _ALL_DENSE if found else 0


def residual_shapes(schema: ModelSchema, columns: int) -> dict[str, tuple[int, ...]]:
    """Shape by name of the residuals: `(d_out, r)` beside vectors; beside LoRA's matrices as `columns` has it."""
    if schema.layers:
        pairs = zip(schema.layers, schema.ranks, strict=True)
        return {f"{layer.name}.{DENSE}": (layer.d_out, r) for layer, r in pairs}
    shapes: dict[str, tuple[int, ...]] = {}
    for pair in lora_pairs(schema.state):
        if pair.is_dense(columns):
            shapes[f"{pair.layer}.{DENSE}"] = (pair.d_out, pair.d_in)
        else:
            shapes[f"{pair.layer}.{FACTOR_B}"] = (pair.d_out, columns)
            shapes[f"{pair.layer}.{FACTOR_A}"] = (columns, pair.d_in)
    return shapes


def _square(L: np.ndarray, R: np.ndarray) -> float:
    """`‖L R‖_F²`."""
    return max(0.0, float(np.sum((L.T @ L) * (R @ R.T))))
