"""Messages: everything that is packed comes back, and nothing that does not fit is let in."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from giva_core import bases, calibration, protocol
from giva_core.config import GivaConfig
from giva_core.errors import ProtocolError
from giva_core.protocol import Hello, Payload, TrainRequest
from giva_core.types import Arrays, ClientUpdate, LayerShape, ModelSchema, QuantisedSketch, SiteEvaluation
from giva_core.wire import PLAIN

SCHEMA = ModelSchema(
    (LayerShape("low", 7, 11), LayerShape("high", 5, 6)), (3, 2), {"head.weight": (2, 5), "head.bias": (2,), "t": ()}
)
GIVA = GivaConfig(rank=3, oversampling=1)
SKETCH_SHAPES = {"low": (11, 4), "high": (6, 3)}


def filled(shapes: protocol.Shapes, start: int = 1) -> Arrays:
    """A different number everywhere."""
    arrays: Arrays = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=int))
        arrays[name] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    return arrays


def assert_equal(first: Arrays, second: Arrays) -> None:
    assert list(first) == list(second)
    for name in first:
        assert (first[name].dtype, first[name].shape) == (second[name].dtype, second[name].shape)
        np.testing.assert_array_equal(first[name], second[name])


# -- packing ----------------------------------------------------------------------------------------------------------


def test_pack_then_unpack_is_identity() -> None:
    arrays = filled(SCHEMA.state)
    vector = protocol.pack(arrays, list(SCHEMA.state))
    assert (vector.dtype, vector.shape) == (np.dtype(np.float32), (13,))
    assert_equal(protocol.unpack(vector, SCHEMA.state), arrays)


def test_pack_takes_the_order_of_the_names_and_any_layout() -> None:
    arrays = {"a": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)), "b": np.array([9.0])}
    np.testing.assert_array_equal(protocol.pack(arrays, ["b", "a"]), [9, 0, 1, 2, 3, 4, 5])
    assert protocol.pack({}, []).shape == (0,)
    assert protocol.unpack(np.zeros(0, np.float32), {}) == {}


def test_unpacked_arrays_are_copies() -> None:
    vector = np.zeros(4, np.float32)
    vector.flags.writeable = False
    made = protocol.unpack(vector, {"a": (3,), "b": (1,)})
    made["a"] += 1
    assert vector.sum() == 0 and made["b"].sum() == 0


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(12, np.float32),
        np.zeros(14, np.float32),
        np.zeros((13, 1), np.float32),
        np.zeros(13, np.float64),
        np.zeros(13, np.int32),
        np.zeros(13, ">f4"),
        np.float32(0),
    ],
)
def test_unpack_refuses_other_forms(vector: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="do not fit the run's schema") as caught:
        protocol.unpack(np.asarray(vector), SCHEMA.state)
    assert caught.value.public is not None and "expected 13" in caught.value.public


def random_sketches(shapes: dict[str, tuple[int, int]], bits: int = 16) -> dict[str, QuantisedSketch]:
    rng = np.random.default_rng(0)
    return {name: bases.quantise(rng.normal(size=shape) * 1e-6, bits) for name, shape in shapes.items()}


@pytest.mark.parametrize("bits", [8, 12, 20])
def test_sketches_come_back(bits: int) -> None:
    sketches = random_sketches(SKETCH_SHAPES, bits)
    payload = Payload(protocol.pack_sketches(sketches, list(SKETCH_SHAPES)))
    assert payload.arrays["codes"].dtype.itemsize == (1 if bits == 8 else 2 if bits == 12 else 4)
    found = protocol.unpack_sketches(payload, SKETCH_SHAPES)
    assert list(found) == list(SKETCH_SHAPES)
    for name, sketch in sketches.items():
        assert found[name].codes.dtype == sketch.codes.dtype and found[name].exponents.dtype == np.int32
        np.testing.assert_array_equal(found[name].codes, sketch.codes)
        np.testing.assert_array_equal(found[name].exponents, sketch.exponents)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("codes", lambda a: a[:-1], "do not fit"),
        ("codes", lambda a: a.astype(np.float32), "do not fit"),
        ("codes", lambda a: a.astype(np.uint16), "do not fit"),
        ("codes", lambda a: a.astype(np.int64), "do not fit"),
        ("codes", lambda a: a.reshape(-1, 1), "do not fit"),
        ("exponents", lambda a: a[1:], "do not fit"),
        ("exponents", lambda a: a.astype(np.int32), "out of range"),
        ("exponents", lambda a: np.full_like(a, 201), "out of range"),
        ("exponents", lambda a: np.full_like(a, -201), "out of range"),
        ("exponents", lambda a: np.full_like(a, -32768), "out of range"),
    ],
)
def test_sketches_of_another_form_are_refused(name: str, change: Any, match: str) -> None:
    arrays = protocol.pack_sketches(random_sketches(SKETCH_SHAPES), list(SKETCH_SHAPES))
    arrays[name] = change(arrays[name])
    with pytest.raises(ProtocolError, match=match):
        protocol.unpack_sketches(Payload(arrays), SKETCH_SHAPES)


@pytest.mark.parametrize("exponent", [-protocol.EXPONENT_LIMIT, protocol.EXPONENT_LIMIT])
def test_mean_of_extreme_sketches_that_are_let_in_stays_in_range(exponent: int) -> None:
    extreme = QuantisedSketch(np.full((6, 3), 2**31 - 1, np.int32), np.full(3, exponent, np.int32))
    payload = Payload(protocol.pack_sketches({"high": extreme}, ["high"]))
    found = protocol.unpack_sketches(payload, {"high": (6, 3)})["high"]
    silent = QuantisedSketch(np.zeros((6, 3), np.int32), np.zeros(3, np.int32))
    mean = bases.mean_sketch([found, silent], [1, 10**9], 20)
    assert np.abs(mean.codes).min() > 0


def test_digest_of_arrays_knows_names_shapes_and_values_but_no_order() -> None:
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.ones(1, np.float32)}
    digest = protocol.arrays_digest(arrays)
    assert digest == protocol.arrays_digest(dict(reversed(arrays.items())))
    others: list[Arrays] = [
        {**arrays, "a": arrays["a"].reshape(3, 2)},
        {**arrays, "b": np.nextafter(arrays["b"], np.float32(2))},
        {"a": arrays["a"], "c": arrays["b"]},
        {"a": arrays["a"]},
    ]
    assert len({digest, *map(protocol.arrays_digest, others)}) == 5


# -- payloads ---------------------------------------------------------------------------------------------------------


def test_values_are_checked_for_their_type() -> None:
    payload = Payload(values={"n": 3, "x": 0.5, "t": "text", "b": True})
    assert (payload.integer("n"), payload.number("x"), payload.number("n"), payload.text("t")) == (3, 0.5, 3.0, "text")
    for read in (lambda: payload.integer("b"), lambda: payload.integer("x"), lambda: payload.number("b")):
        with pytest.raises(ProtocolError, match=r"a message lacks '[bx]'"):
            read()
    with pytest.raises(ProtocolError, match="lacks 'none'; got NoneType; expected str") as caught:
        payload.text("none")
    assert caught.value.public == "message lacks none"
    with pytest.raises(ProtocolError, match="lacks the array 'a'"):
        payload.array("a")


# -- hello ------------------------------------------------------------------------------------------------------------

HELLO = Hello("site-a", 40, 9, SCHEMA, "m" * 64, "s" * 64, "c" * 64, "torch 1", "cpu")


def test_hello_comes_back_with_its_order() -> None:
    found = Hello.from_payload(HELLO.to_payload())
    assert found == HELLO
    assert list(found.schema.state) == list(SCHEMA.state)
    assert {type(value) for value in HELLO.to_payload().values.values()} == {str, int}


def test_hello_of_another_version() -> None:
    payload = HELLO.to_payload()
    spoken, ours = protocol.PROTOCOL_VERSION + 1, protocol.PROTOCOL_VERSION
    payload.values["protocol"] = spoken
    with pytest.raises(ProtocolError, match=f"another protocol version; got {spoken}; expected {ours}"):
        Hello.from_payload(payload)


@pytest.mark.parametrize("name", list(HELLO.to_payload().values))
def test_hello_needs_every_value(name: str) -> None:
    payload = HELLO.to_payload()
    del payload.values[name]
    with pytest.raises(ProtocolError, match=f"lacks '{name}'"):
        Hello.from_payload(payload)


@pytest.mark.parametrize(
    "schema",
    [
        "no json",
        "7",
        "[]",
        "{}",
        '{"layers": [], "state": []}',
        '{"layers": [["a", 1, 2]], "state": {}}',
        '{"layers": [["a", 1, 2, "r"]], "state": {}}',
        '{"layers": [["a", 1, 2, Infinity]], "state": {}}',
        '{"layers": null, "state": {}}',
        '{"layers": [], "state": {"a": 3}}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_hello_with_a_malformed_schema(schema: str) -> None:
    payload = HELLO.to_payload()
    payload.values["schema"] = schema
    with pytest.raises(ProtocolError, match="schema cannot be read"):
        Hello.from_payload(payload)


# -- global arrays and requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("digest", "residual"), [("", False), ("d", False), ("d", True)])
def test_global_arrays_come_back(digest: str, residual: bool) -> None:
    shapes = protocol.global_shapes(SCHEMA, digest, residual)
    arrays = filled(shapes)
    shuffled = dict(sorted(arrays.items()))
    payload = protocol.global_to_payload(shuffled, SCHEMA, digest)
    assert_equal(protocol.global_from_payload(payload, SCHEMA, PLAIN), arrays)
    assert ("low.residual" in arrays) == residual and ("low.lambda_o" in arrays) == bool(digest)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_an_adapter_at_its_start_does_not_travel_in_head_rounds(precision: str) -> None:
    schema = dataclasses.replace(SCHEMA, adapter=("head.weight",))
    coding = protocol.coding_of(precision, schema, filled(schema.state))
    arrays = {**filled(schema.state), "head.bias": np.array([0.5, -1], np.float32)}
    payload = protocol.global_to_payload(arrays, schema, "", coding, is_head=True)
    assert payload.arrays["state"].size == 3
    found = protocol.global_from_payload(payload, schema, coding)
    assert list(found) == list(schema.state) and np.array_equal(found["head.weight"], arrays["head.weight"])
    np.testing.assert_allclose(found["head.bias"], arrays["head.bias"], atol=0.1)
    assert protocol.global_to_payload(arrays, schema, "", coding).arrays["state"].size == 13
    assert "head-only" not in protocol.global_to_payload(arrays, SCHEMA, "", coding, is_head=True).values


def test_wire_order_is_vectors_state_residuals() -> None:
    assert protocol.global_shapes(SCHEMA, "d", True) == {
        "low.lambda_o": (7,),
        "low.lambda_s": (3,),
        "high.lambda_o": (5,),
        "high.lambda_s": (2,),
        "head.weight": (2, 5),
        "head.bias": (2,),
        "t": (),
        "low.residual": (7, 3),
        "high.residual": (5, 2),
    }
    assert list(protocol.global_shapes(SCHEMA, "", 0)) == list(SCHEMA.state)


def test_global_arrays_of_another_length() -> None:
    payload = protocol.global_to_payload(filled(protocol.global_shapes(SCHEMA, "d", False)), SCHEMA, "d")
    payload.arrays["state"] = np.append(payload.arrays["state"], np.float32(0))
    with pytest.raises(ProtocolError, match="do not fit"):
        protocol.global_from_payload(payload, SCHEMA, PLAIN)


@pytest.mark.parametrize(
    ("factor", "names"),
    [
        ("both", ["low.lambda_o", "low.lambda_s", "high.lambda_o", "high.lambda_s"]),
        ("lambda_o", ["low.lambda_o", "high.lambda_o"]),
        ("lambda_s", ["low.lambda_s", "high.lambda_s"]),
    ],
)
def test_trained_names(factor: str, names: list[str]) -> None:
    assert protocol.trained_names(SCHEMA, factor, "d") == (*names, *SCHEMA.state)
    assert protocol.trained_names(SCHEMA, factor, "") == tuple(SCHEMA.state)


@pytest.mark.parametrize(("digest", "residual", "factor"), [("", False, "both"), ("d", True, "lambda_s")])
def test_request_comes_back(digest: str, residual: bool, factor: str) -> None:
    request = TrainRequest(
        filled(protocol.global_shapes(SCHEMA, digest, residual)),
        server_round=2,
        total_rounds=5,
        bases_digest=digest,
        train_names=protocol.trained_names(SCHEMA, factor, digest),
        proximal_mu=0.25,
    )
    found = protocol.train_from_payload(protocol.train_to_payload(request, SCHEMA, factor), SCHEMA, PLAIN)
    assert_equal(found.arrays, request.arrays)
    assert dataclasses.replace(found, arrays={}) == dataclasses.replace(request, arrays={})


@pytest.mark.parametrize("init", ["rand", "topsv", "secsv"])
def test_bases_message_comes_back(init: str) -> None:
    giva = dataclasses.replace(GIVA, init=init)

    def sketches(stage: str) -> dict[str, QuantisedSketch]:
        return random_sketches(calibration.sketch_shapes(calibration.STAGES[stage], SCHEMA.layers, SCHEMA.ranks, giva))

    sent = sketches("range"), None if init == "rand" else sketches("coordinates")
    found = protocol.bases_from_payload(protocol.bases_to_payload(*sent, SCHEMA), SCHEMA, giva)
    for before, after in zip(sent, found, strict=True):
        assert (before is None) == (after is None)
        for name, sketch in (before or {}).items():
            assert after is not None
            np.testing.assert_array_equal(after[name].codes, sketch.codes)
            np.testing.assert_array_equal(after[name].exponents, sketch.exponents)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_update_comes_back() -> None:
    names = protocol.trained_names(SCHEMA, "lambda_o", "d")
    shapes = {name: protocol.global_shapes(SCHEMA, "d", False)[name] for name in names}
    update = ClientUpdate(filled(shapes), 40, 3, 0.5, "d", 1.25)
    payload = protocol.update_to_payload(update, names)
    assert payload.arrays["state"].size == 7 + 5 + 13
    found = protocol.update_from_payload(payload, shapes)
    assert_equal(found.arrays, update.arrays)
    assert dataclasses.replace(found, arrays={}) == dataclasses.replace(update, arrays={})


@pytest.mark.parametrize("name", ["num-examples", "num-steps", "train-loss", "bases", "seconds"])
def test_update_needs_every_value(name: str) -> None:
    payload = protocol.update_to_payload(ClientUpdate({}, 40, 3, 0.5, "d"), [])
    del payload.values[name]
    with pytest.raises(ProtocolError, match=f"lacks '{name}'"):
        protocol.update_from_payload(payload, {})


@pytest.mark.parametrize("counts", [{}, {"tp": np.array([3, 1]), "actual": np.array([4, 5])}])
def test_evaluation_comes_back(counts: Arrays) -> None:
    evaluation = SiteEvaluation(9, 0.75, {"accuracy": 0.5, "mcc": -1.0}, counts)
    payload = protocol.evaluation_to_payload(evaluation)
    found = protocol.evaluation_from_payload(payload)
    assert_equal(dict(found.counts), counts)
    assert dataclasses.replace(found, counts={}) == dataclasses.replace(evaluation, counts={})
    assert {type(value) for value in payload.values.values()} <= {int, float}


def test_metrics_are_numbers() -> None:
    with pytest.raises(ProtocolError, match=r"lacks 'metric\.mcc'"):
        protocol.evaluation_from_payload(Payload(values={"num-examples": 1, "loss": 0.0, "metric.mcc": "high"}))


def test_hello_carries_no_more_than_it_says() -> None:
    values = HELLO.to_payload().values
    assert set(values) == {f.name for f in dataclasses.fields(Hello)} | {"protocol"}
    assert set(json.loads(str(values["schema"]))) == {"layers", "state", "adapter", "form"}
