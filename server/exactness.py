"""What a round's mean loses of the sites' updates, and the residual that gives it back where the run keeps one."""

from __future__ import annotations

from collections.abc import Sequence

from giva_core import aggregate, factored
from giva_core.config import LORA_FAMILY, RunConfig
from giva_core.types import Arrays, BasesSet, ModelSchema


def tells_error(method: str) -> bool:
    """Whether the server can tell the aggregation error of a method's rounds; see `aggregated`."""
    return method in ("giva", "lora-xs", *LORA_FAMILY)


def aggregated(
    config: RunConfig,
    schema: ModelSchema,
    bases: BasesSet | None,
    updates: Sequence[Arrays],
    weights: Sequence[int],
    made: Arrays,
    residual: Arrays,
) -> tuple[float | None, Arrays]:
    """The aggregation error of a training round, and the residual after it.

    Args:
        config: The run's configuration.
        schema: What the sites' models train.
        bases: The run's bases; None for methods without.
        updates: The sites' arrays.
        weights: Training examples of each site.
        made: The next global arrays.
        residual: The residual before the round; empty for runs without.

    Returns:
        `‖Σ w_k ΔW_k − ΔW‖_F / ‖Σ w_k ΔW_k‖_F` with ΔW of `made` and the residual. It is 0 where ΔW is linear in what is
        averaged and the strategy takes the mean (ffa-lora, lora-xs), and None where the server does not know it: it
        holds no random or singular vectors of vera, randlora and osora, and methods without an adapter have no ΔW.
    """
    if config.method == "giva" and bases is not None:
        lost = None
        if config.rounds.mode == "exact":
            lost = aggregate.exact_residual(updates, weights, made, schema.layers)
            residual = aggregate.add_arrays(residual, lost)
        return aggregate.aggregation_error(updates, weights, made, bases, lost), residual
    if config.method in ("ffa-lora", "lora-xs"):
        return (0.0 if config.strategy.name in ("fedavg", "fedprox") else None), residual
    if config.method not in LORA_FAMILY:
        return None, residual
    pairs = factored.lora_pairs(schema.state)
    if config.method == "fedex-lora":
        scale = config.lora.alpha / config.lora.rank
        return 0.0, factored.grown_residual(pairs, residual, updates, weights, made, scale)
    return factored.aggregation_error(pairs, updates, weights, made), residual
