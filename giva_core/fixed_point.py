"""Matrices of integers times a power of two for each column: the form in which products are exact (`exact`)."""

from __future__ import annotations

import numpy as np

from .errors import BasesError, NumericsError

#: Exponents of columns lie in ±this: far beyond float32, and no product of two leaves the normal float64 numbers.
EXPONENT_LIMIT = 256


def quantise(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round each column to integers of `bits` bits, sign included, times a power of two.

        values[:, j] ≈ codes[:, j] · 2^exponents[j],   |codes| <= 2^(bits-1) - 1

    Args:
        values: Finite numbers `(n, q)`.
        bits: Bits of an integer, 2 to 32.

    Returns:
        int32 codes `(n, q)` and int32 exponents `(q,)`; a zero column has codes 0 and exponent 0.

    Raises:
        NumericsError: A value is not finite, or beyond 2^±256.
    """
    codes, exponents = round_columns(finite(values), bits)
    if np.any(np.abs(exponents) > EXPONENT_LIMIT):
        raise NumericsError(
            "a matrix has a column out of range",
            got=f"exponents {exponents.min()} to {exponents.max()}",
            expected=f"within ±{EXPONENT_LIMIT}",
            cause="values that float32 cannot hold",
        )
    return codes.astype(np.int32), exponents


def finite(values: np.ndarray) -> np.ndarray:
    """`values` as a float64 matrix.

    Raises:
        BasesError: Not a matrix.
        NumericsError: A value is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise BasesError("a matrix was expected", got=f"shape {values.shape}", expected="shape (n, q)")
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise NumericsError(
            "a matrix holds numbers that are not finite",
            got=f"{bad} of {values.size} NaN or infinite",
            cause="the loss or its gradient overflowed",
            remedy="use float32 or bfloat16 weights, or check the inputs",
            public="a sketch is not finite",
        )
    return values


def round_columns(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`quantise`, the integers still held in float64."""
    limit = 2.0 ** (bits - 1) - 1.0
    largest = np.max(np.abs(values), axis=0, initial=0.0)
    exponents = np.where(largest > 0.0, np.frexp(largest)[1] - (bits - 1), 0).astype(np.int32)
    # A column whose largest entry would round up to 2^(bits-1) takes the next power of two.
    exponents += (np.rint(np.ldexp(largest, -exponents)) > limit).astype(np.int32)
    return np.rint(np.ldexp(values, -exponents)) + 0.0, exponents


def checked(codes: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers as float64 and the exponents as int64, once they are what `orthonormalise` asks for.

    Raises:
        BasesError: Not a matrix of signed integers with an exponent within ±256 for each column.
        NumericsError: Numbers that are not finite.
    """
    codes, exponents = np.asarray(codes), np.asarray(exponents)
    if codes.dtype.kind == "f":
        finite(codes)
    if codes.ndim != 2 or 0 in codes.shape or codes.dtype.kind != "i":
        raise BasesError(
            "a matrix of integers was expected",
            got=f"{codes.dtype} of shape {codes.shape}",
            expected="signed integers of shape (n, q)",
            remedy="quantise the values first",
        )
    if exponents.shape != codes.shape[1:] or exponents.dtype.kind != "i":
        raise BasesError(
            "the exponents do not fit the integers",
            got=f"{exponents.dtype} of shape {exponents.shape}",
            expected=f"signed integers of shape ({codes.shape[1]},)",
        )
    if np.any(np.abs(exponents.astype(np.int64)) > EXPONENT_LIMIT):
        raise BasesError(
            "an exponent is out of range",
            got=f"{exponents.min()} to {exponents.max()}",
            expected=f"within ±{EXPONENT_LIMIT}",
        )
    return codes.astype(np.float64), exponents.astype(np.int64)
