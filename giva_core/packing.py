"""The content of one message, and the packed form of its arrays.

Trained arrays travel packed into one vector, in an order that both sides derive from the run's schema, so that a round
costs four bytes a number (or fewer, see `wire`) and no names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import ProtocolError
from .types import Arrays, QuantisedSketch

#: Largest exponent of a sketch; float32 needs no more, and the mean of such sketches stays in the range of `exact`.
EXPONENT_LIMIT = 128
#: Smallest exponent; a vanishing gradient has such, and does no harm.
EXPONENT_FLOOR = -200

Value = str | int | float | bool
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Payload:
    """The content of one message: arrays by name and scalars by name."""

    arrays: Arrays = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)

    def value(self, name: str, kind: type) -> Value:
        """The scalar `name`, checked to be of type `kind` (an int counts as a float)."""
        value = self.values.get(name)
        if kind is float and type(value) is int:
            return float(value)
        if value is None or type(value) is not kind:
            raise ProtocolError(
                f"a message lacks '{name}'",
                got=type(value).__name__,
                expected=kind.__name__,
                public=f"message lacks {name}",
            )
        return value

    def text(self, name: str) -> str:
        """The text `name`."""
        return str(self.value(name, str))

    def integer(self, name: str) -> int:
        """The integer `name`."""
        return int(self.value(name, int))

    def number(self, name: str) -> float:
        """The float `name`."""
        return float(self.value(name, float))

    def flag(self, name: str) -> bool:
        """The truth value `name`."""
        return bool(self.value(name, bool))

    def array(self, name: str) -> np.ndarray:
        """The array `name`."""
        if name not in self.arrays:
            raise ProtocolError(
                f"a message lacks the array '{name}'", got=sorted(self.arrays), public=f"message lacks {name}"
            )
        return self.arrays[name]


# -- packing ----------------------------------------------------------------------------------------------------------


def pack(arrays: Arrays, names: Sequence[str]) -> np.ndarray:
    """The arrays, flattened in C order and joined in the order of `names`: float32 `(n,)`."""
    parts = [np.ascontiguousarray(arrays[name], dtype=np.float32).ravel() for name in names]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def unpack(vector: np.ndarray, shapes: Shapes) -> Arrays:
    """The inverse of `pack`: copies by name, in the order of `shapes`.

    Raises:
        ProtocolError: The vector is not one-dimensional float32 of the length that `shapes` adds up to.
    """
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]
    if vector.dtype != np.float32 or vector.ndim != 1 or vector.size != sum(sizes):
        raise misfit(vector, "float32", sum(sizes))
    ends = np.cumsum(sizes)
    return {
        name: vector[end - size : end].reshape(shape).copy()
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }


def misfit(vector: np.ndarray, dtype: str, numbers: int) -> ProtocolError:
    """The error of a packed vector that is not what the schema asks for."""
    return ProtocolError(
        "the packed arrays do not fit the run's schema",
        got=f"{vector.dtype} {vector.shape}",
        expected=f"{dtype} ({numbers},)",
        cause="another model, rank, list of targets, or wire.precision",
        public=f"packed arrays have {vector.size} numbers, expected {numbers}",
    )


def pack_sketches(sketches: Mapping[str, QuantisedSketch], names: Sequence[str]) -> Arrays:
    """Codes and exponents of all layers, each joined into one vector."""
    return {
        "codes": np.concatenate([sketches[name].codes.ravel() for name in names]),
        "exponents": np.concatenate([sketches[name].exponents for name in names]).astype(np.int16),
    }


def unpack_sketches(payload: Payload, shapes: Mapping[str, tuple[int, int]]) -> dict[str, QuantisedSketch]:
    """The inverse of `pack_sketches`; the codes are views of the payload's array.

    Raises:
        ProtocolError: Lengths or types do not fit `shapes`.
    """
    codes, exponents = payload.array("codes"), payload.array("exponents")
    numbers, columns = sum(n * q for n, q in shapes.values()), sum(q for _, q in shapes.values())
    if (
        codes.dtype.kind != "i"
        or codes.dtype.itemsize > 4
        or codes.shape != (numbers,)
        or exponents.shape != (columns,)
    ):
        raise ProtocolError(
            "the sketches do not fit the run's schema",
            got=f"{codes.dtype} {codes.shape}, {exponents.shape}",
            expected=f"integers ({numbers},), ({columns},)",
            public="sketches do not fit the schema",
        )
    if exponents.dtype != np.int16 or np.any((exponents < EXPONENT_FLOOR) | (exponents > EXPONENT_LIMIT)):
        raise ProtocolError("a sketch's exponents are out of range", public="sketch exponents out of range")
    found, start, column = {}, 0, 0
    for name, (n, q) in shapes.items():
        found[name] = QuantisedSketch(
            codes[start : start + n * q].reshape(n, q), exponents[column : column + q].astype(np.int32)
        )
        start, column = start + n * q, column + q
    return found


def arrays_digest(arrays: Arrays) -> str:
    """SHA-256 (hex) over names, shapes and little-endian float32 bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name], dtype="<f4").tobytes())
    return digest.hexdigest()
