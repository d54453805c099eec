"""Server-side arithmetic on the sites' vectors: the mean, the three modes, and the error the mean makes.

ΔW = diag(lambda_o) B diag(lambda_s) A is bilinear in the two vectors, so the mean of the vectors is not the mean of
the updates ΔW. With the coefficient matrix `M = lambda_o lambda_sᵀ (d_out, r)` of a layer, ΔW = (M ∘ B) A, and since A
has orthonormal rows, ‖ΔW‖_F = ‖M ∘ B‖_F: the error of averaging is known exactly, without data.

Federated averaging is McMahan et al., arXiv:1602.05629. `exact` keeps what the mean of the vectors loses as a frozen
residual, as FedEx-LoRA (arXiv:2410.09432) does for LoRA's matrices; `alternate` trains one factor a round, as RoLoRA
(arXiv:2409.02346) does, which makes the mean exact because the other factor is common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .config import RunConfig
from .errors import UpdateError
from .running_mean import RunningMean
from .types import Arrays, BasesSet, LayerShape, ModelSchema

LAMBDA_O, LAMBDA_S, RESIDUAL = "lambda_o", "lambda_s", "residual"


def weighted_mean(updates: Sequence[Arrays], weights: Sequence[int]) -> Arrays:
    """`Σ w_k x_k / Σ w_k` by name, summed exactly whatever the order, returned as float32.

    The mean of one update is that update, bit for bit; see `running_mean`.

    Args:
        updates: The sites' arrays; all with the same names and shapes.
        weights: Training examples of each site.

    Raises:
        UpdateError: No update, a weight below one, or arrays that do not fit each other.
    """
    if not updates or len(updates) != len(weights) or any(w < 1 for w in weights):
        raise UpdateError(
            "there is nothing to average",
            got=f"{len(updates)} updates with weights {list(weights)}",
            expected="at least one update, each with at least one example",
        )
    running = RunningMean()
    for update, weight in zip(updates, weights, strict=True):
        running.add(update, weight)
    return running.mean()


def initial_vectors(schema: ModelSchema) -> Arrays:
    """`lambda_o = 0`, `lambda_s = 1`, or `core = 0`, for every layer, so that ΔW = 0."""
    return {
        name: np.full(shape, name.endswith(f".{LAMBDA_S}"), np.float32)
        for name, shape in schema.vector_shapes().items()
    }


def coefficients(arrays: Arrays, layer: str) -> np.ndarray:
    """`M = lambda_o lambda_sᵀ (d_out, r)` of one layer, float64."""
    return np.outer(arrays[f"{layer}.{LAMBDA_O}"].astype(np.float64), arrays[f"{layer}.{LAMBDA_S}"].astype(np.float64))


def layer_coefficients(arrays: Arrays, bases: BasesSet, layer: str, residual: np.ndarray | None = None) -> np.ndarray:
    """`M (d_out, r)` of one trained layer, such that ΔW = M A: of GiVA's vectors, or of an r × r core; float64."""
    B = bases.layers[layer].B.astype(np.float64)
    if f"{layer}.core" in arrays:
        found: np.ndarray = B @ arrays[f"{layer}.core"].astype(np.float64)
        return found
    M = coefficients(arrays, layer)
    return (M if residual is None else M + residual) * B


def mean_coefficients(updates: Sequence[Arrays], weights: Sequence[int], layer: str) -> np.ndarray:
    """`M̄ = Σ w_k lambda_o,k lambda_s,kᵀ (d_out, r)` with weights that add up to one, float64."""
    total = float(sum(weights))
    return sum(coefficients(u, layer) * (w / total) for u, w in zip(updates, weights, strict=True))  # type: ignore[return-value]


def aggregation_error(
    updates: Sequence[Arrays], weights: Sequence[int], mean: Arrays, bases: BasesSet, residual: Arrays | None = None
) -> float:
    """`‖Σ w_k ΔW_k − ΔW(mean)‖_F / ‖Σ w_k ΔW_k‖_F` over all layers.

    Args:
        updates: The sites' arrays, both vectors of every layer included.
        weights: Training examples of each site.
        mean: The arrays that the server broadcasts next.
        bases: The run's bases.
        residual: What the mode `exact` broadcasts beside them; its layers then have no error but rounding.

    Returns:
        The relative error; 0 where no site moved.
    """
    missed = size = 0.0
    for layer, pair in bases.layers.items():
        wanted = mean_coefficients(updates, weights, layer)
        kept = coefficients(mean, layer)
        if residual is not None:
            kept = kept + residual[f"{layer}.{RESIDUAL}"]
        missed += float(np.sum(((wanted - kept) * pair.B) ** 2))
        size += float(np.sum((wanted * pair.B) ** 2))
    return math.sqrt(missed / size) if size > 0 else 0.0


def exact_residual(
    updates: Sequence[Arrays], weights: Sequence[int], mean: Arrays, layers: Sequence[LayerShape]
) -> Arrays:
    """What the mean of the vectors loses in this round: `M̄ − mean(lambda_o) mean(lambda_s)ᵀ (d_out, r)`, by layer."""
    return {
        f"{layer.name}.{RESIDUAL}": (
            mean_coefficients(updates, weights, layer.name) - coefficients(mean, layer.name)
        ).astype(np.float32)
        for layer in layers
    }


def add_arrays(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Arrays:
    """`first + second` by name; a name of only one of them is taken as it is."""
    return {**first, **{name: first[name] + array if name in first else array for name, array in second.items()}}


def alternate_factor(server_round: int) -> str:
    """The vector that `alternate` trains in this round: `lambda_o` first, since ∂L/∂lambda_s = 0 at the start."""
    return LAMBDA_O if server_round % 2 == 1 else LAMBDA_S


def round_factor(config: RunConfig, server_round: int) -> str:
    """Which of the adapter's arrays a training round trains: `both` kinds, or one by name."""
    if config.method == "rolora":  # B first: A's gradient is zero for as long as B is
        return "lora_B" if server_round % 2 == 1 else "lora_A"
    return alternate_factor(server_round) if config.rounds.mode == "alternate" else "both"
