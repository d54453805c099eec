"""Linear algebra whose result has the same bits on every machine.

BLAS and LAPACK add in an order that depends on the CPU, the number of threads and the version, so the last bits of
their results do too. Here every number comes from one of three sources that have only one possible result:

- products of integers held in float64 whose partial sums all stay below 2^53, hence exact in whatever order, and with
  whatever fused multiply-add, they are added;
- elementwise `+ - * /` and `sqrt`, which IEEE 754 rounds in exactly one way (no transcendental function, no float sum
  whose order numpy may choose, no LAPACK), and scaling by powers of two, which is exact;
- the raw integers of the counter-based generator Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
  SC 2011), keyed by SHA-256.

Eigenvectors come from rotations (`jacobi`), the last bits of orthonormality from a Cholesky QR (Yamamoto et al.,
"Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44, 2015).

Zeros are kept positive (`+ 0.0`) because the sign of a zero is the one thing an exact sum does not settle.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import BasesError, NumericsError
from .fixed_point import checked as checked
from .fixed_point import finite, round_columns
from .fixed_point import quantise as quantise
from .jacobi import diagonalise

#: Integers below this, and sums of them that stay below it, are exact in float64.
EXACT_LIMIT = 2.0**53
#: A singular value below this share of the largest one is rounding of float32 input: the direction is null.
NULL_RATIO = 2.0**-22

_SPREAD = 100  # columns smaller than the largest by more than 2^-100 count as zero
_UNIT_BITS = 26  # unit columns are held in steps of 2^-26, so that a column's squared norm is about 2^52
_MAX_REFINEMENTS = 4


@dataclass(frozen=True)
class Orthonormal:
    """The thin singular value decomposition `Y = Q · diag(singular_values) · rightᵀ`, null directions left out.

    Attributes:
        Q: float64 `(n, k)`, orthonormal columns in the order of falling singular value, the largest entry of each
            (the first of equals) positive.
        singular_values: float64 `(k,)`.
        right: float64 `(q, k)`, the right singular vectors.
        rounding: float64 `(k,)`, the singular value that the rounding of `Y` to integers alone would show in each
            direction; a direction below it is made of rounding.
    """

    Q: np.ndarray
    singular_values: np.ndarray
    right: np.ndarray
    rounding: np.ndarray


# -- random numbers ----------------------------------------------------------------------------------------------------


def uniform(seed: int, stream: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform float32 numbers in [-1, 1), multiples of 2^-23.

    Args:
        seed: The shared seed.
        stream: What the numbers are for; every stream is independent of the others.
        shape: Shape of the result.

    Returns:
        float32 of that shape, the same on every machine.
    """
    steps = (_random_bits(seed, stream, shape) >> np.uint64(40)).astype(np.float64)
    return (steps * 2.0**-23 - 1.0).astype(np.float32)


def signs(seed: int, stream: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random signs (Rademacher), float32 -1 or +1; arguments as for `uniform`."""
    bits = (_random_bits(seed, stream, shape) >> np.uint64(63)).astype(np.float32)
    return bits * np.float32(2.0) - np.float32(1.0)


def _random_bits(seed: int, stream: str, shape: tuple[int, ...]) -> np.ndarray:
    key = hashlib.sha256(f"{seed}:{stream}".encode()).digest()[:16]
    generator = np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64))
    return generator.random_raw(math.prod(shape)).reshape(shape)


# -- orthonormal columns -----------------------------------------------------------------------------------------------


def orthonormalise(codes: np.ndarray, exponents: np.ndarray, count: int | None = None) -> Orthonormal:
    """The singular value decomposition of a matrix of integers, the same bits on every machine.

        K = Yᵀ Y,   K = V Λ Vᵀ,   Q = Y V Λ^(-1/2)

    `K` is exact; `V` comes from Jacobi rotations; `V Λ^(-1/2)`, rounded to integers, gives `Q` by one more exact
    product, so that the columns of `Q` lie in the span of `Y` whatever the rounding; a Cholesky QR makes them
    orthonormal to about 1e-8.

    Args:
        codes: Integers `(n, q)`.
        exponents: Integers `(q,)`; `Y[:, j] = codes[:, j] * 2**exponents[j]`.
        count: How many of the leading directions to return; all that are not null by default.

    Returns:
        The decomposition with k <= min(count, n, q) directions, fewer where directions are null (`NULL_RATIO`).

    Raises:
        BasesError: The arrays do not form a matrix of integers, or a column's squared norm reaches 2^53.
        NumericsError: The values are not finite.
    """
    return orthonormalise_all([(codes, exponents)], count)[0]


def orthonormalise_all(
    matrices: Sequence[tuple[np.ndarray, np.ndarray]], count: int | None = None
) -> list[Orthonormal]:
    """`orthonormalise` for each `(codes, exponents)`; matrices of the same width are diagonalised together.

    The result for a matrix does not depend on the others.
    """
    grams = [_scaled_gram(*checked(codes, exponents)) for codes, exponents in matrices]
    widths: dict[int, list[int]] = {}
    for index, gram in enumerate(grams):
        widths.setdefault(gram.matrix.shape[0], []).append(index)
    found: dict[int, Orthonormal] = {}
    for indices in widths.values():
        eigenvalues, vectors = diagonalise(np.stack([grams[index].matrix for index in indices]))
        for index, values, V in zip(indices, eigenvalues, vectors, strict=True):
            found[index] = _left_factor(matrices[index][0], grams[index], values, V, count)
    return [found[index] for index in range(len(matrices))]


def gram_schmidt(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Orthonormal columns by QR: column j of the result is column j of the matrix, less its part along earlier ones.

    Cheaper than `orthonormalise` and for well-conditioned matrices of full column rank only.

    Args:
        codes: Integers `(n, r)`, r <= n.
        exponents: Integers `(r,)`, as for `orthonormalise`.

    Returns:
        float64 `(n, r)`.

    Raises:
        BasesError: The columns are linearly dependent, or as for `orthonormalise`.
    """
    codes, exponents = checked(codes, exponents)
    gram = _scaled_gram(codes, exponents)
    inverse = _inverse_factor(gram.matrix)
    scaled = np.ldexp(inverse, gram.exponents[:, None])
    return _refine(_product(codes, scaled))


def rotate(columns: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """`columns @ rotation`, orthonormal again: float64 `(n, k)`.

    Args:
        columns: Orthonormal columns `(n, q)`, float32 or float64.
        rotation: Orthonormal columns `(q, k)`.
    """
    return _refine(np.ldexp(_product(np.rint(np.ldexp(finite(columns), _UNIT_BITS)), rotation), -_UNIT_BITS))


def multiply(codes: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`codes @ columns`, exact once `columns` are rounded to as many bits as an exact product leaves them.

    Args:
        codes: Integers `(n, q)`, of whatever type.
        columns: Numbers `(q, k)`.

    Returns:
        float64 `(n, k)`.

    Raises:
        NumericsError: The integers leave fewer than 12 bits, or `columns` are not finite.
    """
    return _product(codes.astype(np.float64), finite(columns))


def unit_rows(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Each row divided by its norm, float64 `(n, r)`; a zero row becomes the constant row `1/sqrt(r)`.

    Args:
        codes: Integers `(n, r)`.
        exponents: Integers `(r,)`, as for `orthonormalise`.
    """
    codes, exponents = checked(codes, exponents)
    rows = np.ldexp(codes, _relative(codes, exponents)[0])
    rows = np.ldexp(rows, -np.frexp(np.max(np.abs(rows), axis=1, keepdims=True))[1])
    squares = _ordered_sum(rows.T * rows.T)[:, None]
    constant = 1.0 / math.sqrt(rows.shape[1])
    return np.where(squares > 0.0, rows / np.sqrt(np.where(squares > 0.0, squares, 1.0)), constant) + 0.0


def positive_largest(columns: np.ndarray) -> np.ndarray:
    """+1 or -1 for each column: the sign of its largest entry in float32, the first of equals; `(k,)`."""
    single = columns.astype(np.float32)
    largest = single[np.argmax(np.abs(single), axis=0), np.arange(single.shape[1])]
    return np.where(largest < 0.0, -1.0, 1.0)


# -- steps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gram:
    """`YᵀY · 2^(-2 shift)`, largest diagonal entry in [1/4, 1), and the exponents of Y's columns less `shift`."""

    matrix: np.ndarray
    exponents: np.ndarray
    shift: int


def _gram(codes: np.ndarray) -> np.ndarray:
    """`codesᵀ codes`, exact: every partial sum is at most the largest squared norm of a column (Cauchy-Schwarz).

    The diagonal holds the squared norms. Its terms are not negative and rounding is monotonic, so a computed value
    below 2^53 proves that the true one is. The bound 2b + log2(n) <= 53 for entries below 2^b is its worst case.
    """
    product = codes.T @ codes + 0.0
    largest = float(np.max(np.diagonal(product)))
    if not largest < EXACT_LIMIT:
        raise BasesError(
            "the integers of a matrix are too large for an exact product",
            got=f"squared norm of a column 2^{math.log2(largest):.1f}",
            expected="less than 2^53",
            cause=f"too many bits for {codes.shape[0]} rows",
            remedy="lower giva.sketch-bits",
        )
    return product


def _relative(codes: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, int]:
    """Exponents less that of the largest column, so none is above 0; columns too small to matter get `-2 * _SPREAD`."""
    sizes = exponents + np.frexp(np.max(np.abs(codes), axis=0))[1]
    filled = np.any(codes != 0.0, axis=0)
    if not filled.any():
        return np.zeros_like(exponents), 0
    top = int(np.max(sizes[filled]))
    return np.where(filled & (sizes >= top - _SPREAD), exponents - top, -2 * _SPREAD), top


def _scaled_gram(codes: np.ndarray, exponents: np.ndarray) -> _Gram:
    relative, top = _relative(codes, exponents)
    kept = relative > -2 * _SPREAD
    product = np.where(kept[:, None] & kept[None, :], _gram(codes), 0.0)
    matrix = np.ldexp(product, relative[:, None] + relative[None, :])
    # The largest entry of Y is in [1/2, 1), so the largest squared norm is in [1/4, n): bring it near 1.
    half = (int(np.frexp(np.max(np.diagonal(matrix)))[1]) + 1) // 2
    return _Gram(np.ldexp(matrix, -2 * half), relative - half, top + half)


def _product(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`codes @ weights`, exact after rounding each column of `weights` to as many bits as fit below 2^53."""
    largest = int(np.max(np.abs(codes), initial=0.0))
    bits = 53 - largest.bit_length() - codes.shape[1].bit_length()
    if bits < 12:
        raise NumericsError(
            "a product of integers would not be exact",
            got=f"{codes.shape[1]} terms of up to {largest.bit_length()} bits",
            expected="at most 41 bits together",
        )
    integers, exponents = round_columns(weights, bits + 1)
    return np.ldexp(codes @ integers + 0.0, exponents)


def _ordered_sum(terms: np.ndarray) -> np.ndarray:
    """Sum over the first axis, first to last: the order of numpy's own sum is its own affair."""
    total = np.zeros(terms.shape[1:])
    for term in terms:
        total = total + term
    return total


def _left_factor(
    codes: np.ndarray, gram: _Gram, eigenvalues: np.ndarray, V: np.ndarray, count: int | None
) -> Orthonormal:
    """`Q = Y V Λ^(-1/2)` for the directions that are not null."""
    n, q = codes.shape
    alive = (eigenvalues > eigenvalues[0] * NULL_RATIO**2) & (eigenvalues > 0.0)
    k = min(int(np.count_nonzero(alive)), n, q if count is None else count)
    values, V = np.sqrt(eigenvalues[:k]), V[:, :k]
    if k == 0:
        return Orthonormal(np.zeros((n, 0)), values, V, values)
    scaled = np.ldexp(V, gram.exponents[:, None])
    Q = _refine(_product(codes.astype(np.float64), scaled / values))
    sign = positive_largest(Q)
    # Rounding errors are spread evenly over ±1/2: variance 1/12; sqrt(n) + sqrt(q) is the norm of such a matrix.
    rounding = (math.sqrt(n) + math.sqrt(q)) / math.sqrt(12.0) * np.sqrt(_ordered_sum(scaled * scaled))
    return Orthonormal(Q * sign + 0.0, np.ldexp(values, gram.shift), V * sign + 0.0, np.ldexp(rounding, gram.shift))


def _refine(columns: np.ndarray) -> np.ndarray:
    """Make nearly orthonormal columns `(n, k)` orthonormal to about 1e-8 without mixing later ones into earlier ones.

    Cholesky QR as a correction, `X ← X + X (R⁻¹ - I)` with `XᵀX = RᵀR`, which needs few bits where R is near I.
    """
    identity = np.eye(columns.shape[1])
    for _ in range(_MAX_REFINEMENTS):
        codes = np.rint(np.ldexp(columns, _UNIT_BITS)) + 0.0
        gram = np.ldexp(_gram(codes), -2 * _UNIT_BITS)
        columns = columns + np.ldexp(_product(codes, _inverse_factor(gram) - identity), -_UNIT_BITS)
        if float(np.max(np.abs(gram - identity))) < 2.0**-10:
            return columns + 0.0
    raise NumericsError(
        "columns did not become orthonormal",
        got=f"{_MAX_REFINEMENTS} refinements",
        cause="a matrix very near to singular",
    )


def _inverse_factor(gram: np.ndarray) -> np.ndarray:
    """`R⁻¹` (upper triangular) of the Cholesky factorisation `gram = RᵀR`, by elimination on `[gram | I]`."""
    k = gram.shape[0]
    work = np.concatenate([gram, np.eye(k)], axis=1)
    for j in range(k):
        pivot = float(work[j, j])
        if not pivot > float(gram[j, j]) * NULL_RATIO**2:
            raise BasesError(
                "the columns of a matrix are linearly dependent",
                got=f"{j} independent columns",
                expected=f"{k} of them",
            )
        work[j] = work[j] / math.sqrt(pivot)
        work[j + 1 :] = work[j + 1 :] - work[j, j + 1 : k, None] * work[j]
    return work[:, k:].T + 0.0
