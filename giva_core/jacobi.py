"""Eigenvectors of small symmetric matrices, the same bits on every machine.

Cyclic Jacobi rotations in the parallel ordering of Brent and Luk ("The solution of singular-value and symmetric
eigenvalue problems on multiprocessor arrays", SIAM J. Sci. Stat. Comput. 6, 1985), written with elementwise
`+ - * /` and `sqrt` alone, which IEEE 754 rounds in exactly one way: no BLAS, no LAPACK, no sum whose order is open.
"""

from __future__ import annotations

import numpy as np

_ROTATE_ABOVE = 2.0**-46  # an off-diagonal entry this small against its two diagonal ones is left alone
_ROTATE_FLOOR = 2.0**-86  # … and one this small against the largest entry: it concerns null directions only
_FLUSH_BELOW = 2.0**-200  # kept away from subnormal numbers, which some processes round to zero and others do not
_MAX_SWEEPS = 30


def diagonalise(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues `(m, q)`, falling, and eigenvectors `(m, q, q)`, as columns, of symmetric matrices `(m, q, q)`.

    A sweep visits every pair of indices once, in q - 1 rounds of q/2 disjoint pairs: row i of the upper half with row
    i of the lower half, after which all rows but the first move on by one place (round-robin), so that after a sweep
    every row is back where it was. The accumulated rotations ride along as further columns.
    """
    m, q, _ = matrices.shape
    size = q + q % 2
    work = np.zeros((m, size, size + q))  # [K | Vᵀ], with an idle row where q is odd
    work[:, :q, :q] = matrices
    work[:, :q, size:] = np.eye(q)
    for _ in range(_MAX_SWEEPS):
        turns = 0
        for _ in range(size - 1):
            work, turned = _rotate_pairs(work)
            turns += turned
        if turns == 0:
            break
        work[np.abs(work) < _FLUSH_BELOW] = 0.0
    values = np.diagonal(work, axis1=1, axis2=2)[:, :q] + 0.0
    order = np.argsort(-values, axis=1, kind="stable")
    vectors = np.take_along_axis(work[:, :q, size:], order[:, :, None], axis=1)
    return np.take_along_axis(values, order, axis=1), np.swapaxes(vectors, 1, 2)


def _rotate_pairs(work: np.ndarray) -> tuple[np.ndarray, int]:
    """One round: rotate each pair to zero its off-diagonal entry (Golub and Van Loan, section 8.5), then move on.

    Returns the new `[K | Vᵀ]` and the number of pairs that turned; the others keep their bits.
    """
    size = work.shape[1]
    upper = np.arange(size // 2)
    lower = upper + size // 2
    a, b, off = work[:, upper, upper], work[:, lower, lower], work[:, upper, lower]
    turn = (np.abs(off) > _ROTATE_ABOVE * np.sqrt(np.abs(a * b))) & (np.abs(off) > _ROTATE_FLOOR)
    tau = (b - a) / np.where(turn, 2.0 * off, 1.0)
    tangent = np.where(turn, np.copysign(1.0, tau) / (np.abs(tau) + np.sqrt(1.0 + tau * tau)), 0.0)
    cosine = 1.0 / np.sqrt(1.0 + tangent * tangent)
    sine = tangent * cosine

    top, bottom = work[:, upper[0] : lower[0]], work[:, lower[0] :]
    c, s = cosine[:, :, None], sine[:, :, None]
    work = _move_on(c * top - s * bottom, s * top + c * bottom, axis=1)
    left, right = work[:, :, : lower[0]], work[:, :, lower[0] : size]
    c, s = cosine[:, None, :], sine[:, None, :]
    work = _move_on(c * left - s * right, s * left + c * right, axis=2, tail=work[:, :, size:])

    # The entries of the pairs themselves are known in closed form.
    place = np.argsort(_move_on(upper, lower, axis=0))
    upper, lower = place[upper], place[lower]
    rest = np.where(turn, 0.0, off)
    work[:, upper, upper], work[:, lower, lower] = a - tangent * off, b + tangent * off
    work[:, upper, lower] = rest
    work[:, lower, upper] = rest
    return work, int(np.count_nonzero(turn))


def _move_on(first: np.ndarray, second: np.ndarray, axis: int, tail: np.ndarray | None = None) -> np.ndarray:
    """Join two halves along `axis`, every place but the first moved on by one round of the round-robin."""
    half = first.shape[axis]

    def part(array: np.ndarray, start: int, stop: int) -> np.ndarray:
        return array[(slice(None),) * axis + (slice(start, stop),)]

    parts = [part(first, 0, 1), part(second, 0, 1)]
    if half > 1:
        parts += [part(first, 1, half - 1), part(second, 1, half), part(first, half - 1, half)]
    return np.concatenate(parts if tail is None else [*parts, tail], axis=axis)
