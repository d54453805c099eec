"""Payloads as protobuf messages and back. What comes in is checked before numpy looks at it.

`worker_pb2` is generated from `worker.proto` by `make proto`, and committed: Flower ships tracked .py files alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from giva_core.errors import ProtocolError
from giva_core.protocol import Payload, Value

from . import worker_pb2 as pb

#: Raised with every change of worker.proto; messenger and worker of one site have to be of one version.
WIRE_VERSION = 1

#: What a request may hold. Protobuf makes an object of 60 bytes from a value of two, so all this is counted before it.
MAX_VALUES = 256
MAX_ARRAYS = 4096
#: Of all fields but values and the arrays' bytes together: the configuration, names, shapes.
MAX_OTHER_BYTES = 2 << 20
_FIELD_BYTES = 16  # what a field counts at least

#: numpy's kinds of numbers that travel: truth values, integers, floats.
_KINDS = "biuf"
_MAX_DIMENSIONS = 8

_Question = TypeVar("_Question", pb.Request, pb.StatusRequest)


def to_wire(payload: Payload) -> pb.Payload:
    """A payload as a protobuf message."""
    message = pb.Payload()
    add_payload(message, payload)
    return message


def add_payload(message: pb.Payload, payload: Payload) -> None:
    """Write a payload into an empty message, which may be a field of another: protobuf would copy a finished one."""
    message.SetInParent()  # also where there is nothing to write: an empty answer is one
    for name, array in payload.arrays.items():
        own = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        message.arrays.add(name=name, dtype=own.dtype.str, shape=array.shape, data=own.tobytes())
    for name, value in payload.values.items():
        add_value(message, name, value)


def add_value(message: pb.Payload, name: str, value: Value) -> None:
    """Add a scalar to a message."""
    if isinstance(value, bool):
        message.values.add(name=name, flag=value)
    elif isinstance(value, int):
        message.values.add(name=name, integer=value)
    elif isinstance(value, float):
        message.values.add(name=name, number=value)
    else:
        message.values.add(name=name, text=value)


def values_of(message: pb.Payload) -> dict[str, Value]:
    """The scalars of a message; those without a value are left out."""
    found = {value.name: (value, value.WhichOneof("value")) for value in message.values}
    return {name: getattr(value, kind) for name, (value, kind) in found.items() if kind}


def from_wire(message: pb.Payload) -> Payload:
    """The inverse of `to_wire`; the arrays are copies.

    Raises:
        ProtocolError: An array is of no known type, or its bytes do not fill its shape.
    """
    return Payload({array.name: _array(array) for array in message.arrays}, values_of(message))


def _array(message: pb.Array) -> np.ndarray:
    shape = tuple(message.shape[: _MAX_DIMENSIONS + 1])
    try:
        dtype = np.dtype(message.dtype)
    except (TypeError, ValueError, SyntaxError):
        dtype = np.dtype(object)
    # the text is compared, too: numpy reads many things as a type, structures and objects among them
    is_known = dtype.kind in _KINDS and dtype.str == message.dtype
    if not is_known or len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise ProtocolError("an array is of no known type", public="an array is of no known type")
    if math.prod(shape) * dtype.itemsize != len(message.data):
        raise ProtocolError(
            "an array's bytes do not fill its shape",
            got=f"{len(message.data)} bytes",
            expected=f"{shape} of {dtype.itemsize} bytes",
            public="an array's bytes do not fill its shape",
        )
    return np.frombuffer(message.data, dtype).reshape(shape).copy()


def parse_request(data: bytes) -> pb.Request:
    """Read a request.

    Raises:
        ProtocolError: That is no request, one of another version, or one that holds more than any run asks for.
    """
    _check_amounts(data)
    return _checked(pb.Request(), data)


def parse_status_request(data: bytes) -> pb.StatusRequest:
    """Read a question for the status; raises ProtocolError as `parse_request` does."""
    return _checked(pb.StatusRequest(), data)


def refusal(reason: str) -> pb.Reply:
    """A reply without a payload."""
    return pb.Reply(protocol=WIRE_VERSION, reason=reason)


def _checked(message: _Question, data: bytes) -> _Question:
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise _unreadable() from None
    if message.protocol != WIRE_VERSION:
        raise ProtocolError(
            "messenger and worker speak different versions",
            got=message.protocol,
            expected=WIRE_VERSION,
            cause="the site's worker and the server's app bundle come from different releases",
            remedy="install the same fedgiva version at server and site",
            public=f"messenger and worker speak different versions, {message.protocol} and {WIRE_VERSION}",
        )
    return message


def _check_amounts(data: bytes) -> None:
    """Hold a serialised request against the limits above, without an object for everything in it."""
    numbers = {field.name: field.number for kind in (pb.Request, pb.Payload) for field in kind.DESCRIPTOR.fields}
    bulk = pb.Array.DESCRIPTOR.fields_by_name["data"].number
    arrays = values = other = 0

    def add(content: memoryview) -> None:
        nonlocal other
        other += max(len(content), _FIELD_BYTES)
        if other > MAX_OTHER_BYTES:
            raise _too_much("bytes of configuration, names and shapes", MAX_OTHER_BYTES)

    for number, part in _fields(memoryview(data)):
        if number != numbers["payload"]:
            add(part)
            continue
        for entry, content in _fields(part):
            if entry == numbers["values"]:
                values += 1
                if values > MAX_VALUES:
                    raise _too_much("values", MAX_VALUES)
            elif entry == numbers["arrays"]:
                arrays += 1
                if arrays > MAX_ARRAYS:
                    raise _too_much("arrays", MAX_ARRAYS)
                for inner, text in _fields(content):
                    add(text[:0] if inner == bulk else text)
            else:
                add(content)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of every field of a message, as protobuf's wire format has them.

    Raises:
        ProtocolError: That is no message, or one with groups, which proto3 does not write.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        begin, kind = at, tag & 7
        if kind == 0:
            _, end = _varint(data, at)
        elif kind == 2:
            size, begin = _varint(data, at)
            end = begin + size
        elif kind in (1, 5):
            end = begin + (8 if kind == 1 else 4)
        else:
            raise _unreadable()
        if end > len(data):
            raise _unreadable()
        yield tag >> 3, data[begin:end]
        at = end


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number at `at`, and where it ends."""
    number = 0
    for place, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + place + 1
    raise _unreadable()


def _unreadable() -> ProtocolError:
    return ProtocolError("a request cannot be read", public="the request cannot be read")


def _too_much(what: str, limit: int) -> ProtocolError:
    return ProtocolError(
        f"a request holds too much: {what}",
        expected=f"at most {limit:,}",
        cause="it was not made by this project's server",
        public=f"the request holds too much: {what}",
    )
