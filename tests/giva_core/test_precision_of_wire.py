"""Numbers in four, two and one bytes: what comes out, what is lost, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from giva_core import protocol, wire
from giva_core.errors import NumericsError, ProtocolError
from giva_core.types import Arrays, LayerShape, ModelSchema

SHAPES = {"a": (3, 5), "b": (7,), "c": ()}
NAMES = list(SHAPES)


def arrays(seed: int = 0, spread: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (spread * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def there_and_back(values: Arrays, precision: str, origin: Arrays) -> Arrays:
    return wire.decode(wire.encode(values, NAMES, precision, origin), SHAPES, precision, origin)


def test_float32_travels_as_it_is() -> None:
    values = arrays()
    found = there_and_back(values, "float32", arrays(1))
    assert all(found[name].tobytes() == values[name].tobytes() for name in NAMES)


@pytest.mark.parametrize(("precision", "size", "share"), [("float16", 2, 2.0**-11), ("int8", 1, 0.5 / 127)])
def test_rounding_is_a_share_of_the_difference_not_of_the_value(precision: str, size: int, share: float) -> None:
    origin = arrays(1, spread=100.0)
    values = {name: (origin[name] + change).astype(np.float32) for name, change in arrays(2, spread=0.1).items()}
    message = wire.encode(values, NAMES, precision, origin)
    assert message["state"].nbytes == size * (15 + 7 + 1)
    found = wire.decode(message, SHAPES, precision, origin)
    for name in NAMES:
        largest = np.max(np.abs(values[name] - origin[name]))
        assert np.max(np.abs(found[name] - values[name])) <= 1.01 * share * largest + 1e-5  # 1e-5: float32 at 100
        assert found[name].dtype == np.float32 and found[name].shape == SHAPES[name]


def test_int8_has_a_scale_for_each_array_and_keeps_zeros() -> None:
    values = {"a": np.zeros((3, 5), np.float32), "b": np.full(7, -2.54, np.float32), "c": np.float32(1e-42)}
    message = wire.encode(values, NAMES, "int8", {})
    assert message["scales"].shape == (3,) and message["state"].dtype == np.int8
    assert message["state"].tolist()[15:22] == [-127] * 7
    found = wire.decode(message, SHAPES, "int8", {})
    assert not found["a"].any() and found["b"] == pytest.approx(np.full(7, -2.54), rel=1e-6)
    assert np.isfinite(found["c"])


def test_feedback_makes_the_mean_over_rounds_right() -> None:
    change, total = np.float32(0.001), np.zeros(3, np.float32)
    lost: Arrays = {"w": np.zeros(3, np.float32)}
    origin = {"w": np.zeros(3, np.float32)}
    for _ in range(50):  # a change far below the scale that the first number sets
        wanted = {"w": np.array([1.0, change, -change], np.float32) + lost["w"]}
        heard = wire.decode(wire.encode(wanted, ["w"], "int8", origin), {"w": (3,)}, "int8", origin)
        lost = {"w": wanted["w"] - heard["w"]}
        total += heard["w"]
    np.testing.assert_allclose(total / 50, [1.0, change, -change], atol=2e-4)


@pytest.mark.parametrize(("precision", "value"), [("int8", np.nan), ("int8", np.inf), ("float16", 1e6)])
def test_numbers_that_cannot_travel(precision: str, value: float) -> None:
    values = {**arrays(), "b": np.full(7, value, np.float32)}
    with pytest.raises(NumericsError, match="'b' cannot travel"):
        wire.encode(values, NAMES, precision, {})


def test_messages_of_another_form() -> None:
    message = wire.encode(arrays(), NAMES, "int8", {})
    with pytest.raises(ProtocolError, match="do not fit"):
        wire.decode(message, SHAPES, "float16", {})
    with pytest.raises(ProtocolError, match="do not fit"):
        wire.decode({**message, "state": message["state"][1:]}, SHAPES, "int8", {})
    for scales in (message["scales"][1:], -message["scales"], message["scales"] * np.float32(np.nan)):
        with pytest.raises(ProtocolError, match="scales"):
            wire.decode({**message, "scales": scales}, SHAPES, "int8", {})


SCHEMA = ModelSchema((LayerShape("low", 7, 5),), (3,), {"head.weight": (2, 5)})
HEAD = {"head.weight": np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)}


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_global_arrays_count_from_the_run_s_start_which_both_sides_know(precision: str) -> None:
    coding = protocol.coding_of(precision, SCHEMA, HEAD)
    start = {**protocol.initial_vectors(SCHEMA), **HEAD}
    assert {name: float(array.mean()) for name, array in start.items() if "lambda" in name} == {
        "low.lambda_o": 0.0,
        "low.lambda_s": 1.0,
    }
    found = protocol.global_from_payload(protocol.global_to_payload(start, SCHEMA, "d", coding), SCHEMA, coding)
    assert all(found[name].tobytes() == start[name].tobytes() for name in start)
    other = protocol.coding_of(precision, SCHEMA, {"head.weight": HEAD["head.weight"] + np.float32(0.5)})
    with pytest.raises(ProtocolError, match="does not come out as the server has it"):
        protocol.global_from_payload(protocol.global_to_payload(start, SCHEMA, "d", coding), SCHEMA, other)
