"""From a seed and an aggregated sketch to the frozen bases A and B, equal to the last bit at every site.

Bases after Gangwar et al., "GiVA: Gradient-Informed Bases for Vector-Based Adaptation", arXiv:2604.21901: A holds the
top right singular vectors of the calibration gradient `G (d_out, d_in)`, B is random or holds left ones. The paper has
one machine and a full gradient. Here no gradient leaves a site; what travels is a linear sketch of it (randomised range
finder: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.3 and 5.1):

    Ω (d_out, q) from the seed;   Y_k = G_kᵀ Ω at site k;   Y = Σ w_k Y_k / Σ w_k = GᵀΩ

Everybody builds A and B from the same broadcast integers with `exact`, and compares digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from . import exact
from .config import GivaConfig
from .errors import BasesError
from .types import Bases, BasesSet, LayerShape, QuantisedSketch

_FRAME_BITS = 20  # bits of random numbers that QR makes orthonormal: exact up to 98,000 rows
_SMALL = 32  # below this many rows a sign matrix is singular often enough to look


# -- sketches ----------------------------------------------------------------------------------------------------------


def projection(seed: int, layer: LayerShape, q: int) -> np.ndarray:
    """`Ω`: random signs, the same at every site.

    A random sign matrix of few rows has a fair chance to be singular, which would hide a part of the gradient; such
    a draw is repeated.

    Args:
        seed: The shared seed.
        layer: The layer the sketch is of.
        q: Columns of the sketch.

    Returns:
        float32 `(d_out, q)`, entries -1 and +1, of rank min(d_out, q).
    """
    attempt = 0
    while True:
        omega = exact.signs(seed, f"projection/{layer.name}/{attempt}", (layer.d_out, q))
        if layer.d_out >= _SMALL or _rank(omega) == min(layer.d_out, q):
            return omega
        attempt += 1


def _rank(omega: np.ndarray) -> int:
    return exact.orthonormalise(omega.astype(np.int8), np.zeros(omega.shape[1], dtype=np.int32)).Q.shape[1]


def quantise(values: np.ndarray, bits: int) -> QuantisedSketch:
    """Round a sketch to integers with one power of two for each column.

        values[:, j] ≈ codes[:, j] · 2^exponents[j],   |codes| <= 2^(bits-1) - 1

    Args:
        values: Finite numbers `(n, q)`.
        bits: Bits of an entry, sign included; `giva.sketch-bits`.

    Returns:
        The sketch: int8 codes up to 8 bits, int16 up to 16, int32 beyond. A zero column stays zero.

    Raises:
        NumericsError: A value is not finite, or out of float32's range by far.
    """
    codes, exponents = exact.quantise(values, bits)
    return QuantisedSketch(codes.astype(code_type(bits)), exponents)


def code_type(bits: int) -> np.dtype:
    """The type of a sketch's codes, by the bits of an entry."""
    return np.dtype(np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32)


def dequantise(sketch: QuantisedSketch) -> np.ndarray:
    """The numbers behind a sketch, exactly: float64 `(n, q)`.

    Raises:
        BasesError: The sketch is malformed.
    """
    codes, exponents = exact.checked(sketch.codes, sketch.exponents)
    return np.ldexp(codes, exponents)


def mean_of_sketches(sketches: Iterable[QuantisedSketch], weights: Sequence[int]) -> np.ndarray:
    """The weighted mean `Σ w_k Y_k / Σ w_k`, float64 `(n, q)`.

    The terms are added one at a time, so that they may be made or read as they are asked for; and in the order given,
    so fix it (sorted by site). Where the codes, weights and the spread of the exponents need at most 53 bits together,
    as they do in practice at 16 bits, every sum is exact and the order does not matter.

    Args:
        sketches: One for each site, all of the same shape.
        weights: Calibration examples of each site, not negative.

    Raises:
        BasesError: No sketches, unequal shapes, a negative weight, or a total weight of zero.
    """
    if min(weights, default=0) < 0 or sum(weights) == 0:
        raise BasesError(
            "the sketches have no weight",
            got=f"weights {list(weights)}",
            expected="counts >= 0, at least one above 0",
            cause="no site had calibration examples",
            remedy="check the sites' data and giva.calibration-batches",
        )
    total = np.zeros((0, 0))
    for number, (sketch, weight) in enumerate(zip_longest(sketches, weights)):
        if sketch is None or weight is None:
            raise BasesError(
                "sketches and weights do not fit",
                got=f"{'fewer' if sketch is None else 'more'} sketches than the {len(weights)} weights",
            )
        term, exponents = exact.checked(sketch.codes, sketch.exponents)
        if number == 0:
            total = np.zeros(term.shape)
        elif total.shape != term.shape:
            raise BasesError(
                "the sites' sketches differ in shape",
                got=f"{total.shape} and {term.shape}",
                expected="one shape",
                cause="a site runs another model or configuration",
            )
        term *= np.ldexp(float(weight), exponents)  # rounded once, as weight · (codes · 2^exponents) is
        total += term
    return total / float(sum(weights))


def mean_sketch(sketches: Iterable[QuantisedSketch], weights: Sequence[int], bits: int) -> QuantisedSketch:
    """`mean_of_sketches`, rounded again to `bits` bits: what the server broadcasts."""
    return quantise(mean_of_sketches(sketches, weights), bits)


def range_bases(layers: Sequence[LayerShape], sketches: Sequence[QuantisedSketch]) -> list[np.ndarray]:
    """`orth(Y)` of each layer, the start of the next pass of a power iteration; equal at every site.

    Null directions, which a gradient of low rank has, are filled with random ones orthogonal to the rest: the shape
    stays what was agreed and the next pass looks for the gradient there too. Whether the rank suffices is decided
    where A is made, in `row_spaces`.

    Args:
        layers: The layers.
        sketches: The aggregate `Y (n, q)` of each, q <= n.

    Returns:
        float32 `(n, q)` for each, orthonormal columns.

    Raises:
        BasesError: A sketch is zero, wider than high, or malformed.
    """
    for layer, sketch in zip(layers, sketches, strict=True):
        n, q = np.shape(sketch.codes)
        if q > n:
            raise BasesError(f"the sketch of {layer.name} is wider than high", got=f"({n}, {q})", expected="q <= n")
    found = exact.orthonormalise_all([(sketch.codes, sketch.exponents) for sketch in sketches])
    made = []
    for layer, sketch, factor in zip(layers, sketches, found, strict=True):
        Q, (n, q) = factor.Q, sketch.codes.shape
        if Q.shape[1] == 0:
            raise _too_low_rank(layer.name, 0, 1)
        if Q.shape[1] < q:
            fill = exact.uniform(0, "range", (n, q - Q.shape[1])).astype(np.float64)
            Q = exact.gram_schmidt(*exact.quantise(np.concatenate([Q, fill], axis=1), _FRAME_BITS))
        made.append(Q.astype(np.float32))
    return made


def coordinate_rank(config: GivaConfig, layer: LayerShape, r: int) -> int:
    """Rows r' of `A'` in the extra pass `Z = G A'ᵀ`: r, or 2r for `secsv`, which takes B from directions r+1..2r.

    Raises:
        BasesError: The layer has fewer than r' directions.
    """
    wanted = 2 * r if config.init == "secsv" else r
    if wanted > min(layer.d_out, layer.d_in):
        raise BasesError(
            f"layer {layer.name} is too small for rank {r} with init {config.init}",
            got=f"{layer.d_out} x {layer.d_in}",
            expected=f"at least {wanted} rows and columns",
            remedy="use the effective rank, LayerShape.effective_rank",
        )
    return wanted


def row_spaces(
    layers: Sequence[LayerShape], sketches: Sequence[QuantisedSketch], ranks: Sequence[int]
) -> list[np.ndarray]:
    """`A'` of each layer: the r leading directions of its gradient's row space.

    Args:
        layers: The layers.
        sketches: The aggregate `Y = GᵀΩ (d_in, q)` of each, q >= r.
        ranks: Rows wanted of each; `coordinate_rank` for the extra pass.

    Returns:
        float32 `(r, d_in)` for each, orthonormal rows by falling singular value of Y, the largest entry of each
        positive.

    Raises:
        BasesError: A sketch is malformed or has fewer than r directions above its own rounding.
    """
    found = exact.orthonormalise_all([(sketch.codes, sketch.exponents) for sketch in sketches])
    for layer, factor, r in zip(layers, found, ranks, strict=True):
        _check_rank(layer, factor, r)
    return [np.ascontiguousarray(factor.Q[:, :r].T, np.float32) for factor, r in zip(found, ranks, strict=True)]


# -- bases -------------------------------------------------------------------------------------------------------------


def build_bases(
    layers: Sequence[LayerShape],
    ranks: Sequence[int],
    sketches: Mapping[str, QuantisedSketch],
    config: GivaConfig,
    coordinates: Mapping[str, QuantisedSketch] | None = None,
) -> BasesSet:
    """A and B of every layer.

    With `A' = row_spaces(Y)` and `Z = G A'ᵀ = U S Wᵀ`, hence `G A'ᵀA' = U S (Wᵀ A')`:

    | init | A | B |
    |---|---|---|
    | rand | A' | QR of uniform random numbers |
    | topsv | rows 1..r of Wᵀ A' | columns 1..r of U |
    | secsv | rows 1..r of Wᵀ A' | columns r+1..2r of U |
    | rowalign | A' | rows of Z, each divided by its norm; a zero row becomes constant |

    With `config.bases = random` both are QRs of uniform random numbers, and nothing is sketched.

    Args:
        layers: The adapted layers, in model order.
        ranks: The effective rank of each.
        sketches: The aggregate `Y (d_in, q)` by layer name; not looked at where the bases are random.
        config: Initialisation and seed.
        coordinates: The aggregate `Z (d_out, r')` by layer name, for every init but `rand`; r' as `coordinate_rank`.

    Raises:
        BasesError: A sketch is missing, of another shape, or of too low a rank.
    """
    pairs = list(zip(layers, ranks, strict=True))
    if config.bases == "random":
        drawn = {layer.name: _random_bases(config.seed, layer, r) for layer, r in pairs}
        return BasesSet(drawn, config.init, bases_digest(drawn, config.init))
    kept = [coordinate_rank(config, layer, r) for layer, r in pairs]
    chosen = _select(sketches, [(layer.name, (layer.d_in, None)) for layer in layers], "sketch")
    spaces = row_spaces(layers, chosen, kept)
    built: dict[str, Bases] = {}
    if config.init == "rand":
        for (layer, r), A in zip(pairs, spaces, strict=True):
            built[layer.name] = Bases(A, _random_columns(config.seed, f"B/{layer.name}", layer.d_out, r))
        return BasesSet(built, config.init, bases_digest(built, config.init))
    wanted = [(layer.name, (layer.d_out, k)) for layer, k in zip(layers, kept, strict=True)]
    projected = _select(coordinates or {}, wanted, "coordinate sketch")
    if config.init == "rowalign":
        for (layer, _), A, Z in zip(pairs, spaces, projected, strict=True):
            built[layer.name] = Bases(A, exact.unit_rows(Z.codes, Z.exponents).astype(np.float32))
        return BasesSet(built, config.init, bases_digest(built, config.init))
    factors = exact.orthonormalise_all([(Z.codes, Z.exponents) for Z in projected])
    for (layer, r), k, A, factor in zip(pairs, kept, spaces, factors, strict=True):
        _check_rank(layer, factor, k)
        built[layer.name] = _singular_pair(A, factor, r)
    return BasesSet(built, config.init, bases_digest(built, config.init))


def bases_digest(layers: Mapping[str, Bases], init: str) -> str:
    """SHA-256 (hex) over `init` and, by sorted layer name, the name, the shapes and the little-endian float32 bytes."""
    digest = hashlib.sha256(f"{init}\n".encode())
    for name in sorted(layers):
        A, B = layers[name].A, layers[name].B
        digest.update(f"{name}\n{A.shape} {B.shape}\n".encode())
        digest.update(np.ascontiguousarray(A, "<f4").tobytes())
        digest.update(np.ascontiguousarray(B, "<f4").tobytes())
    return digest.hexdigest()


def _random_bases(seed: int, layer: LayerShape, r: int) -> Bases:
    A = _random_columns(seed, f"A/{layer.name}", layer.d_in, r)
    return Bases(np.ascontiguousarray(A.T), _random_columns(seed, f"B/{layer.name}", layer.d_out, r))


def _random_columns(seed: int, name: str, rows: int, r: int) -> np.ndarray:
    Q = exact.gram_schmidt(*exact.quantise(exact.uniform(seed, name, (rows, r)), _FRAME_BITS))
    return Q.astype(np.float32)


def _singular_pair(A: np.ndarray, factor: exact.Orthonormal, r: int) -> Bases:
    """Singular vectors of `U S (Wᵀ A')`; column j of B belongs to row j of A, so under topsv they share their sign."""
    rows = exact.rotate(A.T, factor.right)[:, :r]
    sign = exact.positive_largest(rows)
    first = factor.Q.shape[1] - r  # 0 for topsv, r for secsv
    columns = factor.Q[:, first:] * (sign if first == 0 else 1.0)
    return Bases(
        np.ascontiguousarray((rows * sign + 0.0).T, np.float32), np.ascontiguousarray(columns + 0.0, np.float32)
    )


# -- checks ------------------------------------------------------------------------------------------------------------


def _select(
    sketches: Mapping[str, QuantisedSketch], wanted: Sequence[tuple[str, tuple[int, int | None]]], what: str
) -> list[QuantisedSketch]:
    """The sketches by name, their shapes checked; None stands for any width."""
    missing = [name for name, _ in wanted if name not in sketches]
    if missing:
        raise BasesError(
            f"the {what} of {len(missing)} of {len(wanted)} layers is missing",
            got=f"none for {missing[0]}",
            expected="one for each adapted layer",
            cause="a calibration pass that was left out, or another model",
        )
    for name, (rows, width) in wanted:
        shape = np.shape(sketches[name].codes)
        if len(shape) != 2 or shape[0] != rows or (width is not None and shape[1] != width):
            raise BasesError(
                f"the {what} of layer {name} has another shape",
                got=shape,
                expected=f"({rows}, {width or 'q'})",
                cause="another model, rank or initialisation",
            )
    return [sketches[name] for name, _ in wanted]


def _check_rank(layer: LayerShape, factor: exact.Orthonormal, r: int) -> None:
    clear = int(np.count_nonzero(factor.singular_values > factor.rounding))
    if clear < r:
        raise _too_low_rank(layer.name, clear, r)


def _too_low_rank(name: str, got: int, expected: int) -> BasesError:
    cause = (
        "the gradient is zero: the layer does not act on the loss, or nothing was sketched"
        if got == 0
        else "too few calibration examples or tokens, a gradient of low rank, or too few sketch bits"
    )
    return BasesError(
        f"the gradient sketch of {name} has too low a rank",
        got=f"{got} directions above rounding",
        expected=f"at least {expected}",
        cause=cause,
        remedy="raise giva.calibration-batches, giva.sketch-bits or giva.power-passes, or lower giva.rank",
        public="the aggregated calibration sketch of a layer has a lower rank than the bases need",
    )
