"""Sketches are let in one by one, and then compared: none may drown the others. Memory holds a few of them only."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from giva_core import calibration, protocol
from giva_core.bases import mean_sketch, quantise
from giva_core.config import GivaConfig
from giva_core.errors import StoreError
from giva_core.protocol import Hello, Payload
from giva_core.types import LayerShape, ModelSchema, QuantisedSketch
from server import sketch_shelf
from server.exchange import Answer
from server.sketch_shelf import SketchShelf, sketch_bytes
from server.sketches import HeardSketches, SketchIntake, sketch_norm

GIVA = GivaConfig(rank=2, oversampling=1, calibration_batches=1, calibration_batch_size=16)
SCHEMA = ModelSchema((LayerShape("low", 7, 11), LayerShape("top", 5, 7)), (2, 2), {})
STAGE = calibration.STAGES["range"]
SHAPES = calibration.sketch_shapes(STAGE, SCHEMA.layers, SCHEMA.ranks, GIVA)


def values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def answer(site: str, sketches: dict[str, QuantisedSketch], examples: int = 16) -> Answer:
    arrays = protocol.pack_sketches(sketches, list(SHAPES))
    return Answer(site, 1, Payload(arrays, {"num-examples": examples, "loss": 0.5}), "ok", bytes_up=99)


def hear(shelf: SketchShelf, came: Sequence[Answer]) -> HeardSketches:
    """The answers, taken in the order in which they came and handed over in the order of their sites' names."""
    intake = SketchIntake(
        {each.site: Hello(each.site, 40, 9, SCHEMA, "m", "s", "c", "v", "cpu") for each in came}, GIVA, shelf
    )
    slim = [intake.take(each) for each in came]
    assert all(each.payload is None for each in slim)
    return intake.heard(sorted(slim, key=lambda each: each.site))


def heard(folder: Path, **scales: float) -> HeardSketches:
    """Sites whose sketches are `scales` times as large as the others'."""
    came = [
        answer(site, {name: quantise(array * scale, 16) for name, array in values(seed).items()})
        for seed, (site, scale) in enumerate(scales.items())
    ]
    return hear(SketchShelf(folder, SHAPES, 2**20), came)


def test_norm_is_that_of_the_numbers() -> None:
    found = values(0)
    wanted = np.sqrt(sum(np.sum(array**2) for array in found.values()))
    assert sketch_norm({name: quantise(array, 16) for name, array in found.items()}) == pytest.approx(wanted, rel=1e-3)


def test_a_sketch_far_above_the_median_is_refused(tmp_path: Path) -> None:
    found = heard(tmp_path, a=1.0, b=0.2, c=3.0, d=1e4)
    assert [(record.site, record.status) for record in found.records] == [
        ("a", "ok"), ("b", "ok"), ("c", "ok"), ("d", "refused"),
    ]  # fmt: skip
    assert "far larger than the other sites'" in found.records[3].reason
    assert (found.records[3].num_examples, found.records[3].train_loss) == (0, None)
    assert (found.sites, found.weights, found.losses) == (["a", "b", "c"], [16] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    "scales", [{"a": 1.0, "b": 50.0, "c": 1.0}, {"a": 1.0, "b": 1e4}, {"a": 1e-20, "b": 0, "c": 0}]
)
def test_what_may_be_honest_passes(tmp_path: Path, scales: dict[str, float]) -> None:
    assert [record.status for record in heard(tmp_path, **scales).records] == ["ok"] * len(scales)


def test_two_sites_have_the_range_of_float32_alone(tmp_path: Path) -> None:
    found = heard(tmp_path, a=1.0, b=1e39)
    assert [record.status for record in found.records] == ["ok", "refused"]


# -- on the way -------------------------------------------------------------------------------------------------------


def sketches(seed: int, scale: float = 1.0, bits: int = 16) -> dict[str, QuantisedSketch]:
    return {name: quantise(scale * array, bits) for name, array in values(seed).items()}


def with_array(good: Answer, name: str, array: np.ndarray) -> Answer:
    assert good.payload is not None
    return replace(good, payload=Payload({**good.payload.arrays, name: array}, good.payload.values))


HONEST = {"b": 16, "a": 3, "d": 7, "c": 16, "e": 1}


def crowd() -> list[Answer]:
    """Five sites that count and five that do not, in no order."""
    honest = [answer(site, sketches(seed, 3.0**seed), count) for seed, (site, count) in enumerate(HONEST.items())]
    codes = honest[0].payload.array("codes")  # type: ignore[union-attr]
    bad = [
        answer("aa", sketches(9, 1e6)),
        answer("bb", sketches(9), 17),
        with_array(answer("cc", sketches(9)), "codes", codes[:-1]),
        with_array(answer("dd", sketches(9)), "exponents", np.full(6, 200, np.int16)),
        Answer("ee", 2, None, "missing", "no answer"),
    ]
    return [each for pair in zip(bad, honest, strict=True) for each in pair]


def test_kept_or_written_in_any_order_the_mean_has_the_same_bytes_and_nothing_refused_is_in_it(tmp_path: Path) -> None:
    of = dict(zip(HONEST, [sketches(seed, 3.0**seed) for seed in range(5)], strict=True))
    names = sorted(HONEST)
    wanted = {
        layer: mean_sketch([of[site][layer] for site in names], [HONEST[site] for site in names], 16)
        for layer in SHAPES
    }
    came = crowd()
    shuffled = [came[index] for index in np.random.default_rng(0).permutation(len(came))]
    wanted_records = None
    one = sketch_bytes(SHAPES, 16)
    for order in (came, came[::-1], shuffled):
        for limit in (2**20, 3 * one, 0):
            with SketchShelf(tmp_path, SHAPES, limit) as shelf:
                found = hear(shelf, order)
                assert found.sites == names
                # of ten sites five count, and the one that is too large has to be kept as well until that is known
                assert shelf.written_bytes == max(0, 6 * one - limit)
                mean = found.mean(16)
            assert all(mean[name].codes.tobytes() == wanted[name].codes.tobytes() for name in SHAPES)
            assert all(mean[name].exponents.tobytes() == wanted[name].exponents.tobytes() for name in SHAPES)
            wanted_records = wanted_records or found.records
            assert found.records == wanted_records
    assert wanted_records is not None
    assert [record.site for record in wanted_records if record.status == "refused"] == ["aa", "bb", "cc", "dd"]
    assert sum(record.num_examples for record in wanted_records) == sum(HONEST.values())
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_sites(tmp_path: Path) -> None:
    layers = (LayerShape("low", 7, 16003), LayerShape("top", 5, 8003))
    shapes = calibration.sketch_shapes(STAGE, layers, (2, 2), GIVA)
    one = sketch_bytes(shapes, 16)

    def peak(count: int) -> int:
        rng = np.random.default_rng(0)
        hellos = {f"{i:03}": Hello(f"{i:03}", 40, 9, SCHEMA, "m", "s", "c", "v", "cpu") for i in range(count)}
        tracemalloc.start()
        with SketchShelf(tmp_path, shapes, 2 * one) as shelf:
            intake, slim = SketchIntake(hellos, GIVA, shelf), []
            for site in hellos:
                found = {name: quantise(rng.normal(size=shape), 16) for name, shape in shapes.items()}
                came = Payload(protocol.pack_sketches(found, list(shapes)), {"num-examples": 16, "loss": 0.5})
                slim.append(intake.take(Answer(site, 1, came, "ok")))
            found = intake.heard(slim).mean(16)
            assert shelf.written_bytes == (count - 2) * one
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(3)  # what Python makes once
    assert peak(64) < peak(4) + one  # all that stays of a site is some hundred bytes


def test_a_full_disk_is_no_site_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, array: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sketch_shelf, "_write", full)
    with SketchShelf(tmp_path, SHAPES, 0) as shelf, pytest.raises(StoreError, match="No space left on device"):
        hear(shelf, crowd())


def test_wider_integers_than_asked_for_are_refused(tmp_path: Path) -> None:
    wide = {name: QuantisedSketch(s.codes.astype(np.int32), s.exponents) for name, s in quantised(1).items()}
    found = hear(SketchShelf(tmp_path, SHAPES, 2**20), [answer("a", quantised(0)), answer("b", wide)])
    assert [record.status for record in found.records] == ["ok", "refused"]
    assert "wider integers than asked for; got int32; expected int16" in found.records[1].reason


def quantised(seed: int) -> dict[str, QuantisedSketch]:
    return {name: quantise(array, 16) for name, array in values(seed).items()}
