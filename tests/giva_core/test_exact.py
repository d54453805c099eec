"""Properties of the exact linear algebra; that its bits agree between machines is tested in test_selftest."""

from __future__ import annotations

import numpy as np
import pytest

from giva_core import exact
from giva_core.errors import BasesError, NumericsError

PINNED_UNIFORM = [8075424, -5760477, 6692938]
PINNED_SIGNS = [1, -1, 1, 1, -1, 1]


def matrix(n: int, q: int, decay: float = 1.3, seed: int = 0) -> np.ndarray:
    """Singular values near decay^-i, mixed over all columns."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.standard_normal((q, q)))[0]
    return rng.standard_normal((n, q)) * decay ** -np.arange(float(q)) @ mix


def orthonormality_error(columns: np.ndarray) -> float:
    single = columns.astype(np.float32).astype(np.float64)
    return float(np.abs(single.T @ single - np.eye(columns.shape[1])).max())


def values(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    return np.ldexp(codes.astype(np.float64), exponents)


def test_uniform_is_pinned_in_range_and_independent_between_streams() -> None:
    draw = exact.uniform(7, "a", (400, 5))
    assert draw.dtype == np.float32
    assert draw.min() >= -1.0 and draw.max() < 1.0
    assert abs(float(draw.mean())) < 0.05 and abs(float(draw.var()) - 1 / 3) < 0.03
    np.testing.assert_array_equal(draw, exact.uniform(7, "a", (400, 5)))
    for other in (exact.uniform(7, "b", (400, 5)), exact.uniform(8, "a", (400, 5))):
        assert abs(float((draw * other).mean())) < 0.05
    # A few values, so that a change of generator or key does not pass unseen.
    pinned = exact.uniform(0, "pin", (3,)) * 2.0**23
    np.testing.assert_array_equal(pinned, PINNED_UNIFORM)
    np.testing.assert_array_equal(exact.signs(0, "pin", (6,)), PINNED_SIGNS)


def test_signs_are_balanced_signs() -> None:
    draw = exact.signs(3, "s", (300, 7))
    assert draw.dtype == np.float32 and set(np.unique(draw)) == {-1.0, 1.0}
    assert abs(float(draw.mean())) < 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    wanted = matrix(5, 3)
    wanted[2, 1] = bad
    with pytest.raises(NumericsError, match="not finite"):
        exact.orthonormalise(wanted, np.zeros(3, np.int32))


@pytest.mark.parametrize(
    ("n", "q", "decay", "bits"),
    [(300, 16, 1.2, 16), (200, 31, 1.0, 16), (97, 8, 4.0, 20), (9, 9, 1.3, 16), (64, 12, 1.1, 8), (5, 1, 1.0, 16),
     (3, 2, 1.0, 12), (1, 1, 1.0, 16)],
)  # fmt: skip
def test_orthonormalise_is_a_singular_value_decomposition(n: int, q: int, decay: float, bits: int) -> None:
    codes, exponents = exact.quantise(matrix(n, q, decay), bits)
    Y = values(codes, exponents)
    found = exact.orthonormalise(codes, exponents)
    S = np.linalg.svd(Y, compute_uv=False)
    assert found.Q.shape == (n, q)
    assert orthonormality_error(found.Q) <= 1e-6
    assert orthonormality_error(found.right) <= 1e-6
    np.testing.assert_allclose(found.singular_values, S, rtol=1e-5)
    np.testing.assert_allclose(found.Q * found.singular_values @ found.right.T, Y, atol=1e-6 * S[0])
    assert np.all(np.diff(found.singular_values) <= 0.0)


def test_leading_subspaces_equal_those_of_lapack_where_the_spectrum_is_well_separated() -> None:
    codes, exponents = exact.quantise(matrix(120, 10, 2.0), 20)
    U = np.linalg.svd(values(codes, exponents), full_matrices=False)[0]
    Q = exact.orthonormalise(codes, exponents).Q
    for k in (1, 4, 9):
        assert np.linalg.norm(U[:, :k] - Q[:, :k] @ (Q[:, :k].T @ U[:, :k])) < 1e-5


def test_columns_over_a_range_of_a_million_stay_orthonormal() -> None:
    wanted = np.random.default_rng(1).standard_normal((80, 7)) * 10.0 ** -np.arange(7.0)
    codes, exponents = exact.quantise(wanted, 16)
    found = exact.orthonormalise(codes, exponents)
    assert found.Q.shape == (80, 7)
    assert orthonormality_error(found.Q) <= 1e-6
    S = np.linalg.svd(values(codes, exponents), compute_uv=False)
    np.testing.assert_allclose(found.singular_values, S, rtol=1e-6)


def test_coarse_numbers_with_repeated_columns_lose_a_direction_only() -> None:
    wanted = np.rint(matrix(40, 5) * 4.0)  # a few bits, as bfloat16 sums have
    wanted = np.concatenate([wanted, wanted[:, :2]], axis=1)
    found = exact.orthonormalise(*exact.quantise(wanted, 16))
    assert found.Q.shape == (40, 5)
    assert orthonormality_error(found.Q) <= 1e-6


@pytest.mark.parametrize("shape", [(6, 4), (3, 5)])
def test_a_zero_matrix_has_no_directions(shape: tuple[int, int]) -> None:
    found = exact.orthonormalise(np.zeros(shape, np.int16), np.zeros(shape[1], np.int32))
    assert found.Q.shape == (shape[0], 0)


def test_a_matrix_wider_than_high_has_as_many_directions_as_rows() -> None:
    found = exact.orthonormalise(*exact.quantise(matrix(4, 11, 1.0), 16))
    assert found.Q.shape == (4, 4) and found.right.shape == (11, 4)


def test_the_largest_entry_is_positive_and_the_first_of_equals_counts() -> None:
    Q = exact.orthonormalise(*exact.quantise(-matrix(60, 6), 16)).Q.astype(np.float32)
    assert np.all(Q[np.argmax(np.abs(Q), axis=0), np.arange(6)] > 0)
    np.testing.assert_array_equal(exact.positive_largest(np.array([[-1.0, 1.0], [1.0, -1.0], [0.5, 0.0]])), [-1.0, 1.0])


def test_no_zero_is_negative() -> None:
    codes = np.diag([-3, 5, -2, 7]).astype(np.int8)[:, :3]
    found = exact.orthonormalise(codes, np.zeros(3, np.int32))
    assert np.count_nonzero(found.Q == 0.0) > 0
    assert not np.signbit(found.Q[found.Q == 0.0]).any()


def test_a_matrix_keeps_its_bits_in_any_company() -> None:
    widths = [(50, 6), (33, 6), (40, 7), (6, 6), (90, 6)]
    some = [exact.quantise(matrix(n, q, 1.0 + 0.4 * i, seed=i), 16) for i, (n, q) in enumerate(widths)]
    some.insert(2, (np.zeros((8, 6), np.int16), np.zeros(6, np.int32)))
    for (codes, exponents), found in zip(some, exact.orthonormalise_all(some), strict=True):
        alone = exact.orthonormalise(codes, exponents)
        assert found.Q.tobytes() == alone.Q.tobytes()
        assert found.right.tobytes() == alone.right.tobytes()


def test_a_common_power_of_two_changes_the_singular_values_only() -> None:
    codes, exponents = exact.quantise(matrix(30, 4), 16)
    one, other = exact.orthonormalise(codes, exponents), exact.orthonormalise(codes, exponents - 90)
    assert one.Q.tobytes() == other.Q.tobytes()
    np.testing.assert_array_equal(one.singular_values, np.ldexp(other.singular_values, 90))


def test_rounding_tells_directions_of_rounding_from_others() -> None:
    rng = np.random.default_rng(2)
    low = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 9))
    found = exact.orthonormalise(*exact.quantise(low, 12))
    assert int(np.count_nonzero(found.singular_values > found.rounding)) == 3


def test_products_that_would_not_be_exact_are_refused() -> None:
    fits = np.full((4, 2), 2**25, np.int32) * np.array([1, -1], np.int32)
    fits[0, 0] = 0
    assert exact.orthonormalise(fits, np.zeros(2, np.int32)).Q.shape == (4, 2)  # squared norm 4 · 2^50 = 2^52
    with pytest.raises(BasesError, match=r"2\^53"):
        exact.orthonormalise(np.full((8, 2), 2**25, np.int32), np.zeros(2, np.int32))  # 8 · 2^50 = 2^53
    with pytest.raises(NumericsError, match="would not be exact"):
        exact._product(np.full((3, 9), 2.0**40), np.ones((9, 2)))


def test_the_gram_matrix_is_the_one_of_python_integers() -> None:
    codes = exact.quantise(matrix(37, 5), 20)[0]
    wanted = [[sum(int(a) * int(b) for a, b in zip(x, y, strict=True)) for y in codes.T] for x in codes.T]
    assert [[int(entry) for entry in row] for row in exact._gram(codes.astype(np.float64))] == wanted


@pytest.mark.parametrize(
    ("codes", "exponents"),
    [
        (np.zeros((3, 2), np.float32), np.zeros(2, np.int32)),
        (np.zeros((3, 2), np.uint8), np.zeros(2, np.int32)),
        (np.zeros(3, np.int16), np.zeros(1, np.int32)),
        (np.zeros((0, 2), np.int16), np.zeros(2, np.int32)),
        (np.zeros((3, 2), np.int16), np.zeros(3, np.int32)),
        (np.zeros((3, 2), np.int16), np.zeros(2)),
        (np.zeros((3, 2), np.int16), np.array([0, 300], np.int32)),
        (np.zeros((3, 2), np.int16), np.array([0, -(2**31)], np.int32)),
    ],
)
def test_malformed_matrices_are_refused(codes: np.ndarray, exponents: np.ndarray) -> None:
    with pytest.raises(BasesError):
        exact.orthonormalise(codes, exponents)


@pytest.mark.parametrize(("n", "r"), [(40, 7), (23, 23), (5, 1)])
def test_gram_schmidt_is_qr(n: int, r: int) -> None:
    codes, exponents = exact.quantise(exact.uniform(1, "q", (n, r)), 20)
    Q = exact.gram_schmidt(codes, exponents)
    assert orthonormality_error(Q) <= 1e-6
    R = Q.T @ values(codes, exponents)
    assert np.abs(np.tril(R, -1)).max() < 1e-6 and np.all(np.diagonal(R) > 0.0)


def test_gram_schmidt_refuses_dependent_columns() -> None:
    codes = np.array([[1, 2, 2], [3, 1, 6], [5, 4, 10], [2, 7, 4]], np.int16)
    with pytest.raises(BasesError, match="got 2 independent columns"):
        exact.gram_schmidt(codes, np.zeros(3, np.int32))


def test_rotate_is_the_product_of_orthonormal_matrices() -> None:
    columns = exact.orthonormalise(*exact.quantise(matrix(50, 6), 16)).Q.astype(np.float32)
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((6, 6)))[0][:, :4]
    turned = exact.rotate(columns, rotation)
    assert orthonormality_error(turned) <= 1e-6
    np.testing.assert_allclose(turned, columns @ rotation, atol=1e-5)


def test_unit_rows_have_norm_one_also_where_a_row_is_zero_or_tiny() -> None:
    codes = np.array([[3, 4, 0], [0, 0, 0], [0, -1, 0], [100, 5, 7]], np.int16)
    rows = exact.unit_rows(codes, np.array([0, 0, -100], np.int32))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(rows[0], [0.6, 0.8, 0.0], rtol=1e-12)
    np.testing.assert_allclose(rows[1], 3**-0.5)
