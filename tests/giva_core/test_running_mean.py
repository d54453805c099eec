"""A mean that does not depend on the order of its terms, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from giva_core import running_mean
from giva_core.errors import UpdateError
from giva_core.running_mean import RunningMean
from giva_core.types import Arrays


def mean_of(updates: list[Arrays], weights: list[int]) -> Arrays:
    running = RunningMean()
    for update, weight in zip(updates, weights, strict=True):
        running.add(update, weight)
    return running.mean()


def wild(count: int, seed: int = 0) -> list[Arrays]:
    """Numbers over all of float32's range, cancelling ones and subnormal ones among them."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        mantissas, exponents = rng.uniform(-1, 1, size=(4, 3)), rng.integers(-148, 127, size=(4, 3))
        made.append(
            {"a": np.ldexp(mantissas, exponents).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}
        )
    return made


def test_the_mean_is_the_exact_one_rounded() -> None:
    updates, weights = wild(9), [1, 2, 3, 999_999, 2**28 - 1, 2**28, 2**31 - 1, 5, 7]
    found = mean_of(updates, weights)
    for name, array in found.items():
        for index in np.ndindex(array.shape):
            terms = zip(updates, weights, strict=True)
            exact = sum(w * Fraction(float(update[name][index])) for update, w in terms) / sum(weights)
            assert array[index] == pytest.approx(float(exact), rel=2.0**-23, abs=2.0**-149)


def test_the_order_does_not_matter_to_the_last_bit() -> None:
    rng = np.random.default_rng(1)
    updates, weights = wild(40), rng.integers(1, 10_000, size=40).tolist()
    first = mean_of(updates, weights)
    for _ in range(5):
        order = rng.permutation(40)
        found = mean_of([updates[i] for i in order], [weights[i] for i in order])
        assert all(found[name].tobytes() == first[name].tobytes() for name in first)


def test_cancelling_numbers_leave_what_is_left() -> None:
    big, small = np.float32(2.0**100), np.float32(2.0**-100)
    updates = [{"a": np.array([value], np.float32)} for value in (big, small, -big)]
    assert mean_of(updates, [1, 3, 1])["a"] == np.float32(3 * 2.0**-100 / 5)


@pytest.mark.parametrize("weight", [1, 7, 1_000_003, 2**31 - 1])
def test_the_mean_of_equal_updates_is_that_update(weight: int) -> None:
    [update] = wild(1)
    for count in (1, 3):
        found = mean_of([update] * count, [weight] * count)
        assert all(found[name].tobytes() == update[name].tobytes() for name in update)


def test_the_mean_of_one_update_keeps_the_sign_of_its_zeros() -> None:
    found = mean_of([{"a": np.array([-0.0, 0.0, 1.0], np.float32)}], [5])
    assert np.signbit(found["a"]).tolist() == [True, False, False]


def test_many_terms_are_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = wild(30)
    expected = mean_of(updates, [3] * 30)
    monkeypatch.setattr("giva_core.running_mean._CARRY_AFTER", 4)
    found = mean_of(updates, [3] * 30)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_mean_can_be_taken_on_the_way() -> None:
    updates = wild(4)
    running = RunningMean()
    for update in updates[:2]:
        running.add(update, 2)
    assert running.mean()["b"].tobytes() == mean_of(updates[:2], [2, 2])["b"].tobytes()
    for update in updates[2:]:
        running.add(update, 2)
    assert running.mean()["a"].tobytes() == mean_of(updates, [2] * 4)["a"].tobytes()


def test_memory_does_not_grow_with_the_terms() -> None:
    running = RunningMean()
    for update in wild(50, seed=3):
        running.add({"b": update["b"]}, 100)
    assert len(running._digits["b"]) <= 4


def test_what_cannot_be_averaged() -> None:
    running = RunningMean()
    with pytest.raises(UpdateError, match="nothing to average"):
        running.mean()
    with pytest.raises(UpdateError, match="no weight"):
        running.add({"a": np.zeros(2, np.float32)}, 0)
    running.add({"a": np.zeros(2, np.float32)}, 1)
    for other in ({"a": np.zeros(3, np.float32)}, {"b": np.zeros(2, np.float32)}, {}):
        with pytest.raises(UpdateError, match="'a' in shape"):
            running.add(other, 1)


def test_an_array_summed_in_pieces_has_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, weights = wild(9), [1, 2, 3, 4, 5, 6, 2**28 + 1, 8, 9]
    whole = mean_of(updates, weights)
    monkeypatch.setattr(running_mean, "_PIECE", 5)
    found = mean_of(updates, weights)
    assert all(found[name].tobytes() == whole[name].tobytes() for name in whole)
