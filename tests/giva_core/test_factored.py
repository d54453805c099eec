"""LoRA's mean: its error and FedEx-LoRA's residual, against dense arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from giva_core import factored
from giva_core.aggregate import weighted_mean
from giva_core.types import Arrays, ModelSchema

R, SCALE, WEIGHTS = 2, 1.5, [3, 5, 2]
SHAPES = {"a": (30, 25), "b": (7, 40)}  # (d_out, d_in); the second is small enough to become dense at once
STATE = {
    **{f"{name}{factored.INSIDE_A}": (R, d_in) for name, (_, d_in) in SHAPES.items()},
    **{f"{name}{factored.INSIDE_B}": (d_out, R) for name, (d_out, _) in SHAPES.items()},
    "head.weight": (2, 3),
}
PAIRS = factored.lora_pairs(STATE)


def sites(seed: int) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in STATE.items()} for _ in WEIGHTS]


def product(arrays: Arrays, layer: str) -> np.ndarray:
    A, B = (arrays[layer + inside].astype(np.float64) for inside in (factored.INSIDE_A, factored.INSIDE_B))
    return SCALE * B @ A


def lost(updates: list[Arrays], mean: Arrays, layer: str) -> np.ndarray:
    wanted = sum(w / sum(WEIGHTS) * product(update, layer) for update, w in zip(updates, WEIGHTS, strict=True))
    return wanted - product(mean, layer)


def dense(residual: Arrays, layer: str) -> np.ndarray:
    if f"{layer}.residual" in residual:
        return residual[f"{layer}.residual"]
    return residual[f"{layer}.residual_B"].astype(np.float64) @ residual[f"{layer}.residual_A"]


def test_pairs_are_the_layers_with_both_matrices() -> None:
    assert [(pair.layer, pair.d_out, pair.d_in) for pair in PAIRS] == [("a", 30, 25), ("b", 7, 40)]
    assert factored.lora_pairs({f"a{factored.INSIDE_A}": (2, 5)}) == ()


def test_error_is_that_of_dense_matrices() -> None:
    updates = sites(0)
    mean = weighted_mean(updates, WEIGHTS)
    missed = sum(np.sum(lost(updates, mean, name) ** 2) for name in SHAPES)
    size = sum(np.sum((lost(updates, mean, name) + product(mean, name)) ** 2) for name in SHAPES)
    assert factored.aggregation_error(PAIRS, updates, WEIGHTS, mean) == pytest.approx(np.sqrt(missed / size), rel=1e-9)


def test_a_common_factor_leaves_no_error() -> None:
    updates = sites(0)
    for update in updates:
        update.update({name: updates[0][name] for name in STATE if name.endswith(factored.INSIDE_A)})
    assert factored.aggregation_error(PAIRS, updates, WEIGHTS, weighted_mean(updates, WEIGHTS)) < 1e-6


def test_residuals_of_all_rounds_add_up_as_factors_and_as_matrices() -> None:
    residual: Arrays = {}
    wanted = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    columns = []
    for number in range(3):
        updates = sites(number)
        mean = weighted_mean(updates, WEIGHTS)
        residual = factored.grown_residual(PAIRS, residual, updates, WEIGHTS, mean, SCALE)
        columns.append(factored.residual_columns(residual))
        for name in SHAPES:
            wanted[name] += lost(updates, mean, name)
            np.testing.assert_allclose(dense(residual, name), wanted[name], atol=1e-4)
        shapes = factored.residual_shapes(ModelSchema((), (), STATE), columns[-1])
        assert {name: array.shape for name, array in residual.items()} == shapes
        assert all(array.dtype == np.float32 for array in residual.values())
    # a round of three sites adds 4 * 2 columns; `a` is dense from 30 * 25 / 55 = 13.6 columns on, `b` from 5.9 on
    assert columns == [8, 2**31 - 1, 2**31 - 1]
    assert "b.residual" in residual and "a.residual" in residual


def test_one_site_loses_nothing() -> None:
    [update, *_] = sites(0)
    assert factored.grown_residual(PAIRS, {}, [update], [3], update, SCALE) == {}
    assert factored.residual_columns({"head.weight": update["head.weight"]}) == 0
