"""The wire between messenger and worker: payloads survive it, strangers' bytes do not pass, the stubs are current."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.wire import codec
from client.wire import worker_pb2 as pb
from giva_core.errors import ProtocolError, public_reason
from giva_core.protocol import Payload

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("suffix", ["py", "pyi"])
def test_the_committed_stubs_are_those_of_the_definition(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "client" / "wire"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "client" / "wire" / "worker.proto", folder)
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--pyi_out=."]
    subprocess.run([*command, "client/wire/worker.proto"], cwd=tmp_path, check=True)
    name = f"worker_pb2.{suffix}"
    assert (folder / name).read_text() == (ROOT / "client" / "wire" / name).read_text(), "run `make proto`"


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "|b1"])
def test_arrays_survive(dtype: str) -> None:
    array = (np.arange(6).reshape(2, 3) % 2).astype(dtype)
    wire = pb.Payload.FromString(codec.to_wire(Payload({"a": array, "t": array.T})).SerializeToString())
    found = codec.from_wire(wire).arrays
    for name, expected in (("a", array), ("t", array.T)):
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == array.dtype.newbyteorder("<") and found[name].flags.writeable


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1)])
def test_shapes_survive(shape: tuple[int, ...]) -> None:
    found = codec.from_wire(codec.to_wire(Payload({"a": np.ones(shape, np.float32)})))
    assert found.array("a").shape == shape


def test_values_keep_their_types() -> None:
    values = {
        "text": "ä",
        "empty": "",
        "n": -(2**62),
        "zero": 0,
        "x": 0.1,
        "yes": True,
        "no": False,
        "nan": float("inf"),
    }
    found = codec.from_wire(pb.Payload.FromString(codec.to_wire(Payload(values=values)).SerializeToString())).values
    assert found == values and {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in values.items()
    }


def test_a_value_without_one_is_left_out() -> None:
    assert codec.from_wire(pb.Payload(values=[pb.Value(name="a")])).values == {}


@pytest.mark.parametrize(
    "array",
    [
        pb.Array(dtype="<f4", shape=[2], data=b"1234567"),
        pb.Array(dtype="<f4", shape=[2], data=b""),
        pb.Array(dtype="<f4", shape=[-1, -2], data=b"12345678"),
        pb.Array(dtype="<f4", shape=[2**62, 4], data=b"1234"),
        pb.Array(dtype="<f4", shape=[1] * 9, data=b"1234"),
        pb.Array(dtype="|O", shape=[1], data=b"12345678"),
        pb.Array(dtype="O", shape=[1], data=b"12345678"),
        pb.Array(dtype="<U2", shape=[1], data=b"12345678"),
        pb.Array(dtype="<M8[s]", shape=[1], data=b"12345678"),
        pb.Array(dtype="<c8", shape=[1], data=b"12345678"),
        pb.Array(dtype="f4,f4", shape=[1], data=b"12345678"),
        pb.Array(dtype="float32", shape=[1], data=b"1234"),
        pb.Array(dtype=">f4", shape=[0], data=b"1"),
        pb.Array(dtype="", shape=[1], data=b"12345678"),
        pb.Array(dtype="(2,)f4", shape=[1], data=b"12345678"),
        pb.Array(dtype="{'names': [}", shape=[1], data=b"1"),
    ],
)
def test_arrays_of_strangers(array: pb.Array) -> None:
    with pytest.raises(ProtocolError) as caught:
        codec.from_wire(pb.Payload(arrays=[array]))
    assert public_reason(caught.value).startswith("protocol: an array")


def test_requests_are_of_this_version() -> None:
    request = pb.Request(protocol=codec.WIRE_VERSION, kind="query.hello")
    assert codec.parse_request(request.SerializeToString()) == request
    for version in (0, codec.WIRE_VERSION + 1):
        with pytest.raises(ProtocolError) as caught:
            codec.parse_request(pb.Request(protocol=version).SerializeToString())
        assert "speak different versions" in public_reason(caught.value)
        with pytest.raises(ProtocolError):
            codec.parse_status_request(pb.StatusRequest(protocol=version).SerializeToString())


def test_bytes_of_strangers_are_refused_as_such() -> None:
    rng, request = random.Random(3), pb.Request(protocol=1, kind="k", config="{}", payload=codec.to_wire(Payload()))
    outcomes = set()
    for _ in range(2000):
        data = bytearray(request.SerializeToString() + rng.randbytes(rng.randint(0, 40)))
        for _ in range(rng.randint(0, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            codec.from_wire(codec.parse_request(bytes(data)).payload)
            outcomes.add("read")
        except ProtocolError as error:
            outcomes.add(public_reason(error))
    assert "protocol: the request cannot be read" in outcomes and len(outcomes) > 1


def amounts(values: int = 0, arrays: int = 0, **fields: Any) -> bytes:
    """A request that holds so many values and arrays."""
    payload = pb.Payload(values=[pb.Value()] * values, arrays=[pb.Array()] * arrays)
    return pb.Request(protocol=codec.WIRE_VERSION, payload=payload, **fields).SerializeToString()


def field(number: int, content: bytes) -> bytes:
    """A field of bytes as protobuf writes it."""
    size, rest = [], len(content)
    while rest > 127:
        size.append(rest & 127 | 128)
        rest >>= 7
    return bytes([number << 3 | 2, *size, rest]) + content


def test_a_request_holds_so_many_values_and_arrays() -> None:
    most = codec.parse_request(amounts(codec.MAX_VALUES, codec.MAX_ARRAYS, config="x" * (1 << 20)))
    assert (len(most.payload.values), len(most.payload.arrays)) == (codec.MAX_VALUES, codec.MAX_ARRAYS)
    large = pb.Array(dtype="<f4", shape=[1 << 20], data=bytes(4 << 20))
    request = pb.Request(protocol=codec.WIRE_VERSION, payload=pb.Payload(arrays=[large]))
    assert codec.parse_request(request.SerializeToString()) == request


@pytest.mark.parametrize(
    "data",
    [
        amounts(codec.MAX_VALUES + 1),
        amounts(codec.MAX_VALUES) + amounts(1),  # protobuf joins the two payloads
        amounts(arrays=codec.MAX_ARRAYS + 1),
        amounts(config="x" * (codec.MAX_OTHER_BYTES + 1)),
        field(5, field(1, field(3, b"\1" * (codec.MAX_OTHER_BYTES + 1)))),  # a shape
        field(5, field(1, field(4, b"") * 200_000)),
        field(5, field(9, b"") * 200_000),
        field(9, b"") * 200_000,
    ],
)
def test_too_much_is_refused_before_protobuf_reads_it(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_checked", lambda *arguments: pytest.fail("it was parsed"))
    with pytest.raises(ProtocolError) as caught:
        codec.parse_request(data)
    assert public_reason(caught.value).startswith("protocol: the request holds too much")


def test_eight_mebibytes_of_empty_values_cost_nothing() -> None:
    data = field(5, field(2, b"") * (4 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            codec.parse_request(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
