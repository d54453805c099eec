"""Rounding to integers times powers of two: half a step at most, within the bits, and only of finite numbers."""

from __future__ import annotations

import numpy as np
import pytest

from giva_core.errors import BasesError, NumericsError
from giva_core.fixed_point import quantise


def values(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    return np.ldexp(codes.astype(np.float64), exponents)


@pytest.mark.parametrize("bits", [2, 8, 12, 16, 20, 32])
def test_quantise_is_within_half_a_step_and_within_its_bits(bits: int) -> None:
    wanted = np.random.default_rng(0).standard_normal((50, 6)) * np.array([1e-12, 1.0, 1e9, 3.0, 1e-3, 7.0])
    codes, exponents = quantise(wanted, bits)
    assert np.abs(codes.astype(np.int64)).max() <= 2 ** (bits - 1) - 1
    assert np.all(np.abs(values(codes, exponents) - wanted) <= 2.0 ** (exponents - 1))
    again = quantise(values(codes, exponents), bits)
    np.testing.assert_array_equal(values(*again), values(codes, exponents))


def test_quantise_keeps_the_largest_code_where_rounding_up_would_leave_the_range() -> None:
    codes, exponents = quantise(np.array([[1.0 - 2.0**-20, 1.0], [0.0, -1.0]]), 8)
    np.testing.assert_array_equal(codes, [[64, 64], [0, -64]])
    np.testing.assert_array_equal(exponents, [-6, -6])


def test_zero_columns_quantise_to_zero() -> None:
    codes, exponents = quantise(np.array([[0.0, 2.0], [-0.0, 1.0], [0.0, 0.5]]), 16)
    np.testing.assert_array_equal(codes[:, 0], 0)
    assert exponents[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_not_rounded(bad: float) -> None:
    wanted = np.ones((5, 3))
    wanted[2, 1] = bad
    with pytest.raises(NumericsError, match="1 of 15"):
        quantise(wanted, 16)


def test_only_a_matrix_has_columns() -> None:
    with pytest.raises(BasesError, match=r"shape \(4,\)"):
        quantise(np.ones(4), 16)


def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(NumericsError, match="out of range"):
        quantise(np.full((3, 1), 1e200), 16)
