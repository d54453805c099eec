"""Sketch → bases: shapes, conventions, what each initialisation promises, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest

from giva_core import bases
from giva_core.config import INITS, GivaConfig
from giva_core.errors import BasesError, NumericsError
from giva_core.types import Bases, LayerShape, QuantisedSketch

LAYERS = (LayerShape("enc.0.wide", 30, 57), LayerShape("enc.0.tall", 64, 23), LayerShape("dec.tiny", 11, 12))
RANK = 3


def gradient(layer: LayerShape, decay: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(layer.d_out)
    k = min(layer.d_out, layer.d_in)
    U = np.linalg.qr(rng.standard_normal((layer.d_out, k)))[0]
    V = np.linalg.qr(rng.standard_normal((layer.d_in, k)))[0]
    return U * decay ** -np.arange(float(k)) @ V.T


def calibrate(
    config: GivaConfig, layers: Sequence[LayerShape] = LAYERS
) -> tuple[dict[str, QuantisedSketch], dict[str, QuantisedSketch]]:
    """Sketches Y and coordinates Z of one site, with one power pass."""
    sketches, coordinates = {}, {}
    for layer in layers:
        G = gradient(layer)
        q = config.sketch_width(RANK, min(layer.d_out, layer.d_in))
        Y = bases.quantise(G.T @ bases.projection(config.seed, layer, q), 20)
        Z = bases.quantise(G @ bases.range_bases([layer], [Y])[0], 20)
        sketches[layer.name] = bases.quantise(G.T @ bases.range_bases([layer], [Z])[0], 20)
        A = bases.row_spaces([layer], [sketches[layer.name]], [bases.coordinate_rank(config, layer, RANK)])[0]
        coordinates[layer.name] = bases.quantise(G @ A.T, 20)
    return sketches, coordinates


def gram_error(columns: np.ndarray) -> float:
    double = columns.astype(np.float64)
    return float(np.abs(double.T @ double - np.eye(columns.shape[1])).max())


@pytest.mark.parametrize(("d_out", "q"), [(40, 9), (2, 2), (3, 3), (5, 4), (4, 6), (1, 2)])
def test_projection_has_signs_of_full_rank(d_out: int, q: int) -> None:
    for seed in range(6):
        omega = bases.projection(seed, LayerShape("x", d_out, 7), q)
        assert omega.dtype == np.float32 and omega.shape == (d_out, q)
        assert set(np.unique(omega)) <= {-1.0, 1.0}
        assert np.linalg.matrix_rank(omega) == min(d_out, q)


def test_projection_depends_on_seed_and_layer_only() -> None:
    one = bases.projection(1, LAYERS[0], 5)
    np.testing.assert_array_equal(one, bases.projection(1, LayerShape(LAYERS[0].name, 30, 99), 5))
    assert not np.array_equal(one, bases.projection(2, LAYERS[0], 5))
    assert not np.array_equal(one, bases.projection(1, LayerShape("other", 30, 57), 5))


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.int8), (12, np.int16), (16, np.int16), (20, np.int32)])
def test_quantise_takes_the_smallest_type_and_dequantise_is_its_inverse(bits: int, dtype: type) -> None:
    wanted = np.random.default_rng(0).standard_normal((9, 4)) * np.array([1e-6, 1.0, 0.0, 1e5])
    sketch = bases.quantise(wanted, bits)
    assert sketch.codes.dtype == dtype and sketch.exponents.dtype == np.int32
    found = bases.dequantise(sketch)
    assert np.all(np.abs(found - wanted) <= np.abs(wanted).max(axis=0) * 2.0 ** (1 - bits))
    np.testing.assert_array_equal(bases.dequantise(bases.quantise(found, bits)), found)


def test_a_sketch_that_is_not_finite_is_refused_with_a_sentence_that_may_travel() -> None:
    with pytest.raises(NumericsError) as caught:
        bases.quantise(np.array([[1.0, np.nan]]), 16)
    assert caught.value.public == "a sketch is not finite"


def test_mean_is_the_weighted_mean_by_hand() -> None:
    one = QuantisedSketch(np.array([[4, 2], [0, 8]], np.int16), np.array([-1, 0], np.int32))  # 2 2 / 0 8
    two = QuantisedSketch(np.array([[1, 6], [3, 0]], np.int16), np.array([1, 0], np.int32))  # 2 6 / 6 0
    mean = bases.mean_of_sketches([one, two], [1, 3])
    np.testing.assert_array_equal(mean, [[2.0, 5.0], [4.5, 2.0]])
    np.testing.assert_array_equal(bases.dequantise(bases.mean_sketch([one, two], [1, 3], 16)), mean)


def test_mean_does_not_depend_on_the_order_of_sites() -> None:
    rng = np.random.default_rng(4)
    sites = [bases.quantise(rng.standard_normal((25, 6)) * 3.0**k, 16) for k in range(5)]
    weights = [17, 3, 256, 90, 41]
    wanted = bases.mean_of_sketches(sites, weights).tobytes()
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        assert bases.mean_of_sketches([sites[i] for i in order], [weights[i] for i in order]).tobytes() == wanted


def test_mean_has_the_bytes_of_the_written_out_sum_even_where_that_rounds() -> None:
    rng = np.random.default_rng(14)
    sites = [bases.quantise(rng.standard_normal((25, 6)) * 7.0 ** (9 * k), bits) for k, bits in enumerate((32, 8, 20))]
    weights = [2**40 + 1, 3, 2**27 - 1]
    wanted = np.zeros((25, 6))
    for sketch, weight in zip(sites, weights, strict=True):
        wanted = wanted + float(weight) * bases.dequantise(sketch)
    found = bases.mean_of_sketches(iter(sites), weights)
    assert found.tobytes() == (wanted / sum(weights)).tobytes()


def test_the_mean_of_sketches_is_the_sketch_of_the_mean() -> None:
    layer, rng = LAYERS[0], np.random.default_rng(5)
    omega = bases.projection(0, layer, 8)
    sites = [rng.standard_normal((30, 57)) for _ in range(3)]
    mean = bases.mean_of_sketches([bases.quantise(G.T @ omega, 20) for G in sites], [1, 2, 5])
    wanted = ((sites[0] + 2 * sites[1] + 5 * sites[2]) / 8).T @ omega
    np.testing.assert_allclose(mean, wanted, atol=1e-4)


def test_means_without_meaning_are_refused() -> None:
    one = bases.quantise(np.ones((4, 2)), 16)
    other = bases.quantise(np.ones((4, 3)), 16)
    with pytest.raises(BasesError, match="no weight"):
        bases.mean_sketch([one, one], [0, 0], 16)
    with pytest.raises(BasesError, match="no weight"):
        bases.mean_sketch([one, one], [2, -1], 16)
    with pytest.raises(BasesError, match=r"\(4, 2\) and \(4, 3\)"):
        bases.mean_sketch([one, other], [1, 1], 16)
    with pytest.raises(BasesError, match="more sketches than the 1 weights"):
        bases.mean_sketch([one, one], [1], 16)
    with pytest.raises(BasesError, match="fewer sketches than the 2 weights"):
        bases.mean_sketch(iter([one]), [1, 1], 16)
    with pytest.raises(BasesError):
        bases.mean_sketch([], [], 16)


def test_range_basis_spans_the_sketch_and_keeps_its_width_where_the_rank_is_low() -> None:
    rng = np.random.default_rng(6)
    full = rng.standard_normal((40, 5))
    [Q] = bases.range_bases(LAYERS[:1], [bases.quantise(full, 20)])
    assert Q.dtype == np.float32 and Q.shape == (40, 5) and gram_error(Q) <= 1e-6
    assert np.linalg.norm(full - Q @ (Q.T @ full)) < 1e-3
    low = full.copy()
    low[:, 2:] = low[:, :1] * np.array([1.0, 2.0, -4.0])  # rank 2, also after rounding
    [Q] = bases.range_bases(LAYERS[:1], [bases.quantise(low, 20)])
    assert Q.shape == (40, 5) and gram_error(Q) <= 1e-6
    assert np.linalg.norm(low - Q @ (Q.T @ low)) < 1e-3 * np.linalg.norm(low)
    [square] = bases.range_bases(LAYERS[:1], [bases.quantise(np.outer(np.arange(1.0, 8.0), np.ones(7)), 16)])
    assert square.shape == (7, 7) and gram_error(square) <= 1e-6


def test_range_basis_refuses_zero_and_wide_sketches() -> None:
    with pytest.raises(BasesError, match=r"enc.0.wide.*gradient is zero"):
        bases.range_bases(LAYERS[:1], [bases.quantise(np.zeros((9, 4)), 16)])
    with pytest.raises(BasesError, match="wider than high"):
        bases.range_bases(LAYERS[:1], [bases.quantise(np.ones((3, 4)), 16)])


def test_row_space_equals_the_top_singular_vectors() -> None:
    layer = LAYERS[0]
    sketches, _ = calibrate(GivaConfig(rank=RANK))
    A = bases.row_spaces([layer], [sketches[layer.name]], [RANK])[0]
    Vh = np.linalg.svd(gradient(layer))[2][:RANK]
    assert A.shape == (RANK, layer.d_in) and A.dtype == np.float32 and A.flags.c_contiguous
    assert gram_error(A.T) <= 1e-6
    assert np.linalg.norm(Vh - Vh @ A.T @ A) < 1e-3
    assert np.all(A[np.arange(RANK), np.argmax(np.abs(A), axis=1)] > 0)


@pytest.mark.parametrize("bits", [12, 16, 20])
def test_a_gradient_of_low_rank_is_named_with_what_was_found_and_needed(bits: int) -> None:
    layer, rng = LAYERS[0], np.random.default_rng(7)
    G = (rng.standard_normal((30, 2)) @ rng.standard_normal((2, 57))).astype(np.float32)
    sketch = bases.quantise(G.T @ bases.projection(0, layer, 11), bits)
    assert bases.row_spaces([layer], [sketch], [2])[0].shape == (2, 57)
    with pytest.raises(BasesError, match=r"enc.0.wide.*got 2 directions.*at least 3.*too few calibration") as caught:
        bases.row_spaces([layer], [sketch], [3])
    assert caught.value.public is not None and layer.name not in caught.value.public


@pytest.mark.parametrize("init", INITS)
def test_bases_have_their_shapes_and_orthonormal_rows(init: str) -> None:
    config = GivaConfig(rank=RANK, init=init)
    built = bases.build_bases(LAYERS, [RANK] * 3, *with_config(config))
    assert built.init == init and list(built.layers) == [layer.name for layer in LAYERS]
    for layer in LAYERS:
        A, B = built.layers[layer.name].A, built.layers[layer.name].B
        assert A.shape == (RANK, layer.d_in) and B.shape == (layer.d_out, RANK)
        assert A.dtype == B.dtype == np.float32 and A.flags.c_contiguous and B.flags.c_contiguous
        assert gram_error(A.T) <= 1e-6
        assert np.all(A[np.arange(RANK), np.argmax(np.abs(A), axis=1)] > 0)
        if init == "rowalign":
            np.testing.assert_allclose(np.linalg.norm(B, axis=1), 1.0, rtol=1e-6)
        else:
            assert gram_error(B) <= 1e-6


def test_random_bases_come_from_the_seed_and_the_layers_name_alone() -> None:
    config = GivaConfig(rank=RANK, bases="random")
    built = bases.build_bases(LAYERS, [RANK] * 3, {}, config)
    for layer in LAYERS:
        A, B = built.layers[layer.name].A, built.layers[layer.name].B
        assert A.shape == (RANK, layer.d_in) and B.shape == (layer.d_out, RANK)
        assert A.dtype == B.dtype == np.float32 and A.flags.c_contiguous
        assert gram_error(A.T) <= 1e-6 and gram_error(B) <= 1e-6
    sketches, coordinates = calibrate(config)
    assert bases.build_bases(LAYERS, [RANK] * 3, sketches, config, coordinates).digest == built.digest
    other = bases.build_bases(LAYERS, [RANK] * 3, {}, GivaConfig(rank=RANK, bases="random", seed=1))
    assert other.digest != built.digest
    square = [LayerShape(name, 9, 9) for name in "ab"]
    first, second = bases.build_bases(square, [RANK] * 2, {}, config).layers.values()
    assert not np.array_equal(first.A, second.A) and not np.array_equal(first.A, first.B.T)


def with_config(
    config: GivaConfig,
) -> tuple[dict[str, QuantisedSketch], GivaConfig, dict[str, QuantisedSketch]]:
    sketches, coordinates = calibrate(config)
    return sketches, config, coordinates


@pytest.mark.parametrize("init", ["topsv", "secsv"])
def test_singular_inits_take_the_left_vectors_they_name(init: str) -> None:
    built = bases.build_bases(LAYERS, [RANK] * 3, *with_config(GivaConfig(rank=RANK, init=init)))
    for layer in LAYERS:
        U, _, Vh = np.linalg.svd(gradient(layer))
        A, B = built.layers[layer.name].A, built.layers[layer.name].B
        first = 0 if init == "topsv" else RANK
        for j in range(RANK):
            assert abs(float(Vh[j] @ A[j])) > 0.999
            assert abs(float(U[:, first + j] @ B[:, j])) > 0.999
        if init == "topsv":  # a pair of singular vectors has one sign between them
            assert np.all(np.einsum("ir,ij,rj->r", B, gradient(layer), A) > 0.0)


def test_rowalign_has_the_direction_of_each_row_of_the_projected_gradient() -> None:
    sketches, config, coordinates = with_config(GivaConfig(rank=RANK, init="rowalign"))
    built = bases.build_bases(LAYERS, [RANK] * 3, sketches, config, coordinates)
    for layer in LAYERS:
        A, B = built.layers[layer.name].A, built.layers[layer.name].B
        wanted = gradient(layer) @ A.T
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(B, wanted, atol=1e-3)


def test_rand_depends_on_the_seed_and_the_layers_name() -> None:
    config = GivaConfig(rank=RANK)
    twins = (LayerShape("one", 13, 21), LayerShape("two", 13, 21))
    sketches, _ = calibrate(config, twins)
    first = bases.build_bases(twins, [RANK] * 2, sketches, config)
    other = bases.build_bases(twins, [RANK] * 2, sketches, GivaConfig(rank=RANK, seed=1))
    assert not np.array_equal(first.layers["one"].B, first.layers["two"].B)
    assert not np.array_equal(first.layers["one"].B, other.layers["one"].B)
    np.testing.assert_array_equal(first.layers["one"].A, other.layers["one"].A)


@pytest.mark.parametrize("r", [1, 11])
def test_rank_one_and_full_rank(r: int) -> None:
    layer = LAYERS[2]
    config = GivaConfig(rank=r)
    q = config.sketch_width(r, 11)
    sketch = bases.quantise(gradient(layer, 1.1).T @ bases.projection(0, layer, q), 16)
    built = bases.build_bases([layer], [r], {layer.name: sketch}, config).layers[layer.name]
    assert gram_error(built.A.T) <= 1e-6 and gram_error(built.B) <= 1e-6


def test_the_digest_does_not_depend_on_the_order_of_layers_or_sketches() -> None:
    sketches, config, coordinates = with_config(GivaConfig(rank=RANK, init="topsv"))
    one = bases.build_bases(LAYERS, [RANK] * 3, sketches, config, coordinates)
    turned = dict(reversed(sketches.items()))
    other = bases.build_bases(LAYERS[::-1], [RANK] * 3, turned, config, coordinates)
    assert one.digest == other.digest == bases.bases_digest(other.layers, "topsv")


def test_the_digest_is_the_documented_one_and_sees_every_part() -> None:
    pair = Bases(np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((4, 2), np.float32))
    text = b"rand\nlayer\n(2, 3) (4, 2)\n" + pair.A.astype("<f4").tobytes() + pair.B.astype("<f4").tobytes()
    digest = bases.bases_digest({"layer": pair}, "rand")
    assert digest == hashlib.sha256(text).hexdigest()
    changed = pair.A.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    others = [
        bases.bases_digest({"layer": pair}, "topsv"),
        bases.bases_digest({"layers": pair}, "rand"),
        bases.bases_digest({"layer": Bases(pair.A.reshape(3, 2), pair.B)}, "rand"),
        bases.bases_digest({"layer": Bases(changed, pair.B)}, "rand"),
    ]
    assert len({digest, *others}) == 5


def test_coordinate_rank_is_doubled_for_secsv_and_limited_by_the_layer() -> None:
    layer = LAYERS[2]
    assert [bases.coordinate_rank(GivaConfig(init=init), layer, 4) for init in INITS] == [4, 4, 8, 4]
    with pytest.raises(BasesError, match=r"dec.tiny.*11 x 12"):
        bases.coordinate_rank(GivaConfig(init="secsv"), layer, 6)


def test_missing_and_misshapen_sketches_are_refused_by_name() -> None:
    sketches, config, coordinates = with_config(GivaConfig(rank=RANK, init="topsv"))
    ranks = [RANK] * 3
    with pytest.raises(BasesError, match=r"coordinate sketch of 3 of 3 layers is missing"):
        bases.build_bases(LAYERS, ranks, sketches, config)
    short = {name: sketch for name, sketch in sketches.items() if name != "dec.tiny"}
    with pytest.raises(BasesError, match=r"none for dec.tiny"):
        bases.build_bases(LAYERS, ranks, short, config, coordinates)
    turned = sketches | {"dec.tiny": coordinates["dec.tiny"]}  # d_out rows instead of d_in
    with pytest.raises(BasesError, match=r"dec.tiny has another shape; got \(11, 3\); expected \(12, q\)"):
        bases.build_bases(LAYERS, ranks, turned, config, coordinates)
    with pytest.raises(BasesError, match=r"coordinate sketch of layer enc.0.wide has another shape"):
        bases.build_bases(LAYERS, ranks, sketches, config, coordinates | {"enc.0.wide": sketches["enc.0.wide"]})
