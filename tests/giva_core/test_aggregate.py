"""Averaging: the mean, what it loses of ΔW, and the modes that lose nothing."""

from __future__ import annotations

import numpy as np
import pytest

from giva_core.aggregate import (
    add_arrays,
    aggregation_error,
    alternate_factor,
    exact_residual,
    initial_vectors,
    mean_coefficients,
    weighted_mean,
)
from giva_core.errors import UpdateError
from giva_core.types import Arrays, Bases, BasesSet, LayerShape, ModelSchema

LAYERS = (LayerShape("first", 7, 11), LayerShape("second", 5, 13))
RANKS = (3, 2)
WEIGHTS = (2, 5, 1)


@pytest.fixture
def bases() -> BasesSet:
    """Orthonormal rows in A; any B."""
    rng = np.random.default_rng(0)
    made = {}
    for layer, r in zip(LAYERS, RANKS, strict=True):
        A = np.linalg.qr(rng.normal(size=(layer.d_in, r)))[0].T
        made[layer.name] = Bases(A, rng.normal(size=(layer.d_out, r)))
    return BasesSet(made, "rand", "digest")


def random_updates(count: int = 3, seed: int = 1) -> list[Arrays]:
    """Vectors away from their start, and a head."""
    rng = np.random.default_rng(seed)
    names = {**initial_vectors(ModelSchema(LAYERS, RANKS, {})), "head.weight": np.zeros((2, 3))}
    return [{name: rng.normal(size=a.shape).astype(np.float32) for name, a in names.items()} for _ in range(count)]


def dense_delta(arrays: Arrays, bases: BasesSet, layer: str, residual: np.ndarray | float = 0.0) -> np.ndarray:
    """diag(lambda_o) B diag(lambda_s) A + (R ∘ B) A, written out."""
    A, B = bases.layers[layer].A, bases.layers[layer].B
    o, s = arrays[f"{layer}.lambda_o"].astype(float), arrays[f"{layer}.lambda_s"].astype(float)
    return np.diag(o) @ B @ np.diag(s) @ A + (residual * B) @ A


def dense_mean(updates: list[Arrays], weights: tuple[int, ...], bases: BasesSet, layer: str) -> np.ndarray:
    """Σ w_k ΔW_k, written out."""
    pairs = zip(updates, weights, strict=True)
    return sum(w / sum(weights) * dense_delta(update, bases, layer) for update, w in pairs)  # type: ignore[return-value]


# -- the mean ---------------------------------------------------------------------------------------------------------


def test_mean_by_hand() -> None:
    updates = [{"a": np.array([1.0, 4.0], np.float32)}, {"a": np.array([5.0, 0.0], np.float32)}]
    mean = weighted_mean(updates, [3, 1])
    assert mean["a"].dtype == np.float32
    np.testing.assert_array_equal(mean["a"], [2.0, 3.0])


@pytest.mark.parametrize("weight", [1, 3, 7, 1_000_003])
def test_mean_of_one_update_is_that_update_bit_for_bit(weight: int) -> None:
    [update] = random_updates(1)
    mean = weighted_mean([update], [weight])
    assert list(mean) == list(update)
    assert all(mean[name].tobytes() == update[name].tobytes() for name in update)


def test_mean_of_equal_updates_is_that_update() -> None:
    [update] = random_updates(1)
    mean = weighted_mean([update] * 3, WEIGHTS)
    assert all(np.array_equal(mean[name], update[name]) for name in update)


def test_weights_count_as_copies() -> None:
    updates = random_updates()
    copies = [update for update, weight in zip(updates, WEIGHTS, strict=True) for _ in range(weight)]
    mean, long = weighted_mean(updates, WEIGHTS), weighted_mean(copies, [1] * sum(WEIGHTS))
    for name in mean:
        np.testing.assert_allclose(mean[name], long[name], rtol=1e-6, atol=1e-7)


def test_the_order_of_the_sum_does_not_matter() -> None:
    big, small = {"a": np.array([2.0**60], np.float32)}, {"a": np.array([1.0], np.float32)}
    negative = {"a": -big["a"]}
    assert weighted_mean([big, negative, small], [1, 1, 1])["a"] == np.float32(1 / 3)
    assert weighted_mean([big, small, negative], [1, 1, 1])["a"] == np.float32(1 / 3)


def test_mean_leaves_the_updates_alone() -> None:
    updates = random_updates()
    before = [{name: array.copy() for name, array in update.items()} for update in updates]
    weighted_mean(updates, WEIGHTS)
    assert all(np.array_equal(u[name], b[name]) for u, b in zip(updates, before, strict=True) for name in u)


@pytest.mark.parametrize(("count", "weights"), [(0, []), (3, [1, 2]), (2, [1, 0]), (2, [3, -1])])
def test_nothing_to_average(count: int, weights: list[int]) -> None:
    with pytest.raises(UpdateError, match="nothing to average"):
        weighted_mean(random_updates(count), weights)


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.zeros(3, np.float32)},
        {"b": np.zeros(2, np.float32)},
        {},
        {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)},
    ],
)
def test_updates_that_do_not_fit_each_other(other: Arrays) -> None:
    with pytest.raises(UpdateError, match="'a' in shape"):
        weighted_mean([{"a": np.zeros(2, np.float32)}, other], [1, 1])


# -- what the mean loses ----------------------------------------------------------------------------------------------


def test_vectors_start_where_delta_is_zero(bases: BasesSet) -> None:
    start = initial_vectors(ModelSchema(LAYERS, RANKS, {}))
    assert {name: array.shape for name, array in start.items()} == {
        "first.lambda_o": (7,),
        "first.lambda_s": (3,),
        "second.lambda_o": (5,),
        "second.lambda_s": (2,),
    }
    assert {array.dtype for array in start.values()} == {np.dtype(np.float32)}
    assert all(not dense_delta(start, bases, layer.name).any() for layer in LAYERS)
    assert all((start[f"{layer.name}.lambda_s"] == 1).all() for layer in LAYERS)


def test_error_equals_the_dense_computation(bases: BasesSet) -> None:
    updates = random_updates()
    mean = weighted_mean(updates, WEIGHTS)
    missed = size = 0.0
    for layer in LAYERS:
        wanted = dense_mean(updates, WEIGHTS, bases, layer.name)
        missed += float(np.sum((wanted - dense_delta(mean, bases, layer.name)) ** 2))
        size += float(np.sum(wanted**2))
    error = aggregation_error(updates, WEIGHTS, mean, bases)
    assert error > 0.1
    assert error == pytest.approx(np.sqrt(missed / size), rel=1e-9)


def test_error_by_hand() -> None:
    # mean of lambda_o lambda_s: (1·1 + 3·3) / 2 = 5; product of the means: 2·2 = 4
    updates = [{"l.lambda_o": np.array([x], np.float32), "l.lambda_s": np.array([x], np.float32)} for x in (1.0, 3.0)]
    one = BasesSet({"l": Bases(np.ones((1, 1)), np.ones((1, 1)))}, "rand", "")
    assert aggregation_error(updates, [1, 1], weighted_mean(updates, [1, 1]), one) == pytest.approx(1 / 5)


def test_no_error_where_no_site_moved_or_only_one_did(bases: BasesSet) -> None:
    start = initial_vectors(ModelSchema(LAYERS, RANKS, {}))
    assert aggregation_error([start, start], [1, 2], start, bases) == 0.0
    [update] = random_updates(1)
    assert aggregation_error([update], [4], weighted_mean([update], [4]), bases) == 0.0


@pytest.mark.parametrize("server_round", [1, 2])
def test_alternate_has_no_error(bases: BasesSet, server_round: int) -> None:
    updates, [common] = random_updates(), random_updates(1, seed=9)
    trained = alternate_factor(server_round)
    for update in updates:
        update.update({name: common[name] for name in common if not name.endswith(trained)})
    mean = weighted_mean(updates, WEIGHTS)
    assert aggregation_error(updates, WEIGHTS, mean, bases) < 1e-6
    assert not np.array_equal(updates[0][f"first.{trained}"], updates[1][f"first.{trained}"])


def test_alternate_begins_with_the_vector_that_has_a_gradient() -> None:
    assert [alternate_factor(number) for number in (1, 2, 3, 4)] == ["lambda_o", "lambda_s", "lambda_o", "lambda_s"]


def test_exact_mode_reproduces_the_mean_of_the_deltas(bases: BasesSet) -> None:
    updates = random_updates()
    mean = weighted_mean(updates, WEIGHTS)
    residual = exact_residual(updates, WEIGHTS, mean, LAYERS)
    assert {name: (array.shape, array.dtype) for name, array in residual.items()} == {
        "first.residual": ((7, 3), np.dtype(np.float32)),
        "second.residual": ((5, 2), np.dtype(np.float32)),
    }
    for layer in LAYERS:
        made = dense_delta(mean, bases, layer.name, residual[f"{layer.name}.residual"].astype(float))
        np.testing.assert_allclose(made, dense_mean(updates, WEIGHTS, bases, layer.name), atol=1e-6)
    assert aggregation_error(updates, WEIGHTS, mean, bases, residual) < 1e-7
    assert aggregation_error(updates, WEIGHTS, mean, bases) > 0.1


def test_residuals_of_rounds_add_up(bases: BasesSet) -> None:
    earlier = {"first.residual": np.full((7, 3), 0.5, np.float32)}
    updates = random_updates()
    mean = weighted_mean(updates, WEIGHTS)
    total = add_arrays(earlier, exact_residual(updates, WEIGHTS, mean, LAYERS))
    pairs = list(zip(updates, WEIGHTS, strict=True))
    wanted = sum(w / sum(WEIGHTS) * dense_delta(update, bases, "first", 0.5) for update, w in pairs)
    made = dense_delta(mean, bases, "first", total["first.residual"].astype(float))
    np.testing.assert_allclose(made, wanted, atol=1e-6)
    assert list(total) == ["first.residual", "second.residual"]


def test_mean_coefficients_by_hand() -> None:
    updates = [
        {"l.lambda_o": np.array([1.0, 2.0], np.float32), "l.lambda_s": np.array([3.0], np.float32)},
        {"l.lambda_o": np.array([5.0, 0.0], np.float32), "l.lambda_s": np.array([1.0], np.float32)},
    ]
    np.testing.assert_allclose(mean_coefficients(updates, [1, 3], "l"), [[(3 + 3 * 5) / 4], [6 / 4]])


def test_add_arrays_takes_lonely_names_as_they_are() -> None:
    total = add_arrays({"a": np.ones(2), "b": np.ones(1)}, {"a": np.full(2, 2.0), "c": np.zeros(3)})
    assert {name: array.tolist() for name, array in total.items()} == {"a": [3, 3], "b": [1], "c": [0, 0, 0]}
