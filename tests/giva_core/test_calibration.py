"""The calibration's plan: passes, widths, shapes, and that together they find the federation's subspace."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from giva_core import bases, calibration
from giva_core.calibration import STAGES, Sketches
from giva_core.config import GivaConfig
from giva_core.errors import BasesError
from giva_core.types import BasesSet, LayerShape, QuantisedSketch

LAYERS = (LayerShape("tall", 40, 23), LayerShape("wide", 9, 31))
RANKS = (3, 2)
GIVA = GivaConfig(rank=3, oversampling=4, seed=5)
WEIGHTS = (2, 5)


def gradients(seed: int) -> dict[str, np.ndarray]:
    """A gradient `(d_out, d_in)` for each layer, its singular values falling fast."""
    rng = np.random.default_rng(seed)
    made = {}
    for layer in LAYERS:
        n = min(layer.d_out, layer.d_in)
        U = np.linalg.qr(rng.normal(size=(layer.d_out, n)))[0]
        V = np.linalg.qr(rng.normal(size=(layer.d_in, n)))[0]
        made[layer.name] = (U * 0.3 ** np.arange(n)) @ V.T
    return made


SITES = [gradients(1), gradients(2)]
FEDERATION = {layer.name: np.average([site[layer.name] for site in SITES], axis=0, weights=WEIGHTS) for layer in LAYERS}


def run_plan(config: GivaConfig, sites: list[dict[str, np.ndarray]], weights: tuple[int, ...]) -> BasesSet:
    """All passes as sites and server make them, and the bases from what they come to."""
    previous: Sketches | None = None
    kept: dict[str, Sketches] = {}
    for stage in calibration.stages(config):
        multipliers = calibration.multipliers(stage, LAYERS, RANKS, config, previous)
        shapes = calibration.sketch_shapes(stage, LAYERS, RANKS, config)
        found: list[dict[str, QuantisedSketch]] = []
        for gradient in sites:
            made = {
                name: (G.T if stage.side == "output" else G) @ multipliers[name].astype(float)
                for name, G in gradient.items()
            }
            assert {name: array.shape for name, array in made.items()} == shapes
            found.append({name: bases.quantise(array, config.sketch_bits) for name, array in made.items()})
        previous = {
            name: bases.mean_sketch([sketch[name] for sketch in found], weights, config.sketch_bits) for name in shapes
        }
        kept["coordinates" if stage.name == "coordinates" else stage.side] = previous
    return bases.build_bases(LAYERS, RANKS, kept["output"], config, kept.get("coordinates"))


def shared_directions(A: np.ndarray, G: np.ndarray) -> float:
    """Smallest cosine between the row space of A and the leading right singular subspace of G."""
    Vh = np.linalg.svd(G)[2][: len(A)]
    return float(np.linalg.svd(A.astype(float) @ Vh.T)[1].min())


@pytest.mark.parametrize(
    ("passes", "init", "names"),
    [
        (0, "rand", ["range"]),
        (1, "rand", ["range", "left", "right"]),
        (0, "topsv", ["range", "coordinates"]),
        (2, "rowalign", ["range", "left", "right", "left", "right", "coordinates"]),
    ],
)
def test_stages(passes: int, init: str, names: list[str]) -> None:
    found = calibration.stages(dataclasses.replace(GIVA, power_passes=passes, init=init))
    assert [stage.name for stage in found] == names
    assert {stage.name: stage.side for stage in found}.items() <= {
        "range": "output",
        "left": "input",
        "right": "output",
        "coordinates": "input",
    }.items()


@pytest.mark.parametrize(
    ("stage", "init", "shapes"),
    [
        ("range", "rand", {"tall": (23, 7), "wide": (31, 6)}),
        ("left", "rand", {"tall": (40, 7), "wide": (9, 6)}),
        ("right", "secsv", {"tall": (23, 10), "wide": (31, 8)}),
        ("coordinates", "topsv", {"tall": (40, 3), "wide": (9, 2)}),
        ("coordinates", "secsv", {"tall": (40, 6), "wide": (9, 4)}),
    ],
)
def test_shapes_of_what_a_site_returns(stage: str, init: str, shapes: dict[str, tuple[int, int]]) -> None:
    config = dataclasses.replace(GIVA, init=init)
    assert calibration.sketch_shapes(STAGES[stage], LAYERS, RANKS, config) == shapes


def test_sketches_are_never_wider_than_the_layer() -> None:
    config = dataclasses.replace(GIVA, oversampling=64)
    assert [calibration.width(STAGES["range"], layer, 3, config) for layer in LAYERS] == [23, 9]


def test_first_multiplier_depends_on_seed_and_layer_alone() -> None:
    def first(config: GivaConfig) -> dict[str, np.ndarray]:
        return calibration.multipliers(STAGES["range"], LAYERS, RANKS, config, None)

    made, again, other = first(GIVA), first(GIVA), first(dataclasses.replace(GIVA, seed=6))
    assert {name: (a.shape, a.dtype) for name, a in made.items()} == {
        "tall": ((40, 7), np.dtype(np.float32)),
        "wide": ((9, 6), np.dtype(np.float32)),
    }
    assert all(np.array_equal(made[name], again[name]) for name in made)
    assert not any(np.array_equal(made[name], other[name]) for name in made)


@pytest.mark.parametrize("stage", ["left", "right", "coordinates"])
def test_later_passes_need_the_one_before(stage: str) -> None:
    config = dataclasses.replace(GIVA, init="topsv")
    for previous in (None, {"tall": bases.quantise(np.ones((23, 7)), 16)}):
        with pytest.raises(BasesError, match=f"'{stage}' has no aggregate"):
            calibration.multipliers(STAGES[stage], LAYERS, RANKS, config, previous)


@pytest.mark.parametrize("init", ["rand", "topsv", "secsv", "rowalign"])
def test_plan_finds_the_subspace_of_the_federation_s_gradient(init: str) -> None:
    config = dataclasses.replace(GIVA, init=init, power_passes=2)
    built = run_plan(config, SITES, WEIGHTS)
    for layer, r in zip(LAYERS, RANKS, strict=True):
        A, B = built.layers[layer.name].A, built.layers[layer.name].B
        assert (A.shape, B.shape) == ((r, layer.d_in), (layer.d_out, r))
        assert shared_directions(A, FEDERATION[layer.name]) > 0.999
        assert shared_directions(A, SITES[0][layer.name]) < 0.99


def test_power_passes_sharpen_the_subspace() -> None:
    config = dataclasses.replace(GIVA, oversampling=0)
    found = [
        shared_directions(
            run_plan(dataclasses.replace(config, power_passes=passes), SITES, WEIGHTS).layers["tall"].A,
            FEDERATION["tall"],
        )
        for passes in (0, 2)
    ]
    assert found[0] < found[1]


def test_topsv_takes_the_left_singular_vectors_of_the_federation() -> None:
    built = run_plan(dataclasses.replace(GIVA, init="topsv", power_passes=2), SITES, WEIGHTS)
    U, _, Vh = np.linalg.svd(FEDERATION["tall"])
    pair = built.layers["tall"]
    np.testing.assert_allclose(np.abs(np.diag(U[:, :3].T @ pair.B)), 1, atol=1e-3)
    np.testing.assert_allclose(np.abs(np.diag(Vh[:3] @ pair.A.T)), 1, atol=1e-3)


def test_sites_share_their_sketches_not_their_number() -> None:
    one = run_plan(GIVA, [SITES[0]], (7,))
    split = run_plan(GIVA, [SITES[0], SITES[0]], (3, 4))
    assert one.digest == split.digest
