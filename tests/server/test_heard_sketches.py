"""Sketches are let in one by one, and then compared: none may drown the others."""

from __future__ import annotations

import numpy as np
import pytest

from giva_core import calibration, protocol
from giva_core.bases import quantise
from giva_core.config import GivaConfig
from giva_core.protocol import Hello, Payload
from giva_core.types import LayerShape, ModelSchema
from server.exchange import Answer
from server.sketches import HeardSketches, read_sketches, sketch_norm

GIVA = GivaConfig(rank=2, oversampling=1, calibration_batches=1, calibration_batch_size=16)
SCHEMA = ModelSchema((LayerShape("low", 7, 11), LayerShape("top", 5, 7)), (2, 2), {})
STAGE = calibration.STAGES["range"]
SHAPES = calibration.sketch_shapes(STAGE, SCHEMA.layers, SCHEMA.ranks, GIVA)


def values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def heard(**scales: float) -> HeardSketches:
    """Sites whose sketches are `scales` times as large as the others'."""
    answers = []
    for seed, (site, scale) in enumerate(scales.items()):
        sketches = {name: quantise(array * scale, 16) for name, array in values(seed).items()}
        arrays = protocol.pack_sketches(sketches, list(SHAPES))
        answers.append(Answer(site, seed, Payload(arrays, {"num-examples": 16, "loss": 0.5}), "ok"))
    hellos = {site: Hello(site, 40, 9, SCHEMA, "m", "s", "c", "v", "cpu") for site in scales}
    return read_sketches(STAGE, answers, hellos, SCHEMA, GIVA)


def test_norm_is_that_of_the_numbers() -> None:
    found = values(0)
    wanted = np.sqrt(sum(np.sum(array**2) for array in found.values()))
    assert sketch_norm({name: quantise(array, 16) for name, array in found.items()}) == pytest.approx(wanted, rel=1e-3)


def test_a_sketch_far_above_the_median_is_refused() -> None:
    found = heard(a=1.0, b=0.2, c=3.0, d=1e4)
    assert [(record.site, record.status) for record in found.records] == [
        ("a", "ok"), ("b", "ok"), ("c", "ok"), ("d", "refused"),
    ]  # fmt: skip
    assert "far larger than the other sites'" in found.records[3].reason
    assert (found.records[3].num_examples, found.records[3].train_loss) == (0, None)
    assert (len(found.sketches), found.weights, found.losses) == (3, [16] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    "scales", [{"a": 1.0, "b": 50.0, "c": 1.0}, {"a": 1.0, "b": 1e4}, {"a": 1e-20, "b": 0, "c": 0}]
)
def test_what_may_be_honest_passes(scales: dict[str, float]) -> None:
    assert [record.status for record in heard(**scales).records] == ["ok"] * len(scales)


def test_two_sites_have_the_range_of_float32_alone() -> None:
    found = heard(a=1.0, b=1e39)
    assert [record.status for record in found.records] == ["ok", "refused"]
