"""How trained numbers travel: as they are, or as differences in two bytes or one.

    float32   v
    float16   v − v₀, rounded to float16
    int8      v − v₀ = codes · scale, one scale (float32) for each array, codes from −127 to 127

`v₀` is what both sides know. On the way down it is the run's start: the starting head, and GiVA's vectors at 0 and 1,
so that a site needs nothing of earlier rounds. On the way up it is what the site was sent. The digest of what a site
decodes travels both ways: sides that count from different numbers find out.

Rounding is to nearest, the same on every machine, and what int8 loses is not lost for good (error feedback: Seide et
al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., arXiv:1901.09847). On the way up the
site adds what its last update lost to the next one. On the way down the server keeps its state in float32 and adds the
sites' differences to that, not to what it sent: what rounding took from a broadcast is in the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import NumericsError, ProtocolError
from .packing import Shapes, misfit, pack, unpack
from .types import Arrays

_TYPES = {"float16": np.dtype(np.float16), "int8": np.dtype(np.int8)}
_CODE_LIMIT = 127.0


@dataclass(frozen=True)
class Coding:
    """The form in which trained numbers travel in a run.

    Attributes:
        precision: `float32`, `float16` or `int8`.
        start: v₀ of the way down, by name; an array that is not here starts at 0.
    """

    precision: str = "float32"
    start: Arrays = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether numbers travel as they are."""
        return self.precision == "float32"


PLAIN = Coding()


def encode(arrays: Arrays, names: Sequence[str], precision: str, origin: Arrays) -> Arrays:
    """The arrays of a message.

    Args:
        arrays: The values v, float32.
        names: Which of them, in wire order.
        precision: As in `Coding`.
        origin: v₀ by name; not looked at for float32.

    Returns:
        `state`, the codes of all arrays joined, and for int8 `scales`, one number for each array.

    Raises:
        NumericsError: A number is not finite, or too large for float16.
    """
    if precision == "float32":
        return {"state": pack(arrays, names)}
    differences = [_difference(arrays[name], origin.get(name)) for name in names]
    if precision == "float16":
        with np.errstate(over="ignore"):
            halves = [difference.astype(np.float16) for difference in differences]
        for name, half in zip(names, halves, strict=True):
            _check_finite(name, half)
        return {"state": _joined(halves, np.float16)}
    codes, scales = [], []
    for name, difference in zip(names, differences, strict=True):
        _check_finite(name, difference)
        scale = np.float32(np.max(np.abs(difference), initial=0.0) / np.float32(_CODE_LIMIT))
        # in float64, whose rounding to the nearest integer is the same everywhere; a subnormal scale can go over
        ratio = difference.astype(np.float64) / np.float64(scale) if scale else np.zeros(difference.shape)
        codes.append(np.clip(np.rint(ratio), -_CODE_LIMIT, _CODE_LIMIT).astype(np.int8))
        scales.append(scale)
    return {"state": _joined(codes, np.int8), "scales": np.array(scales, np.float32)}


def decode(message: Arrays, shapes: Shapes, precision: str, origin: Arrays) -> Arrays:
    """The inverse of `encode`: the values, float32, in the order of `shapes`.

    Raises:
        ProtocolError: The message has not the type or the length that `shapes` adds up to, or scales that cannot be.
    """
    state = message.get("state", np.zeros(0, np.int64))
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]
    if precision == "float32":
        return unpack(state, shapes)
    if state.dtype != _TYPES[precision] or state.ndim != 1 or state.size != sum(sizes):
        raise misfit(state, precision, sum(sizes))
    parts = np.split(state, np.cumsum(sizes)[:-1]) if sizes else []
    scales = _scales(message, len(sizes)) if precision == "int8" else np.ones(len(sizes), np.float32)
    found: Arrays = {}
    for (name, shape), part, scale in zip(shapes.items(), parts, scales, strict=True):
        difference = (part.astype(np.float32) * scale).reshape(shape)
        start = origin.get(name)
        found[name] = difference if start is None else (start + difference).astype(np.float32)
    return found


def _scales(message: Arrays, count: int) -> np.ndarray:
    scales = message.get("scales", np.zeros(0))
    if scales.dtype != np.float32 or scales.shape != (count,) or not np.all(np.isfinite(scales) & (scales >= 0)):
        raise ProtocolError(
            "the scales of the packed arrays cannot be",
            got=f"{scales.dtype} {scales.shape}",
            expected=f"{count} finite float32 numbers that are not negative",
            public="scales of packed arrays cannot be",
        )
    return scales


def _difference(value: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    value = np.asarray(value, np.float32)
    return value if start is None else value - start


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    flat: list[np.ndarray] = [np.asarray(part, dtype).ravel() for part in parts]
    return np.concatenate(flat) if flat else np.zeros(0, dtype)


def _check_finite(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise NumericsError(
            f"'{name}' cannot travel in this precision",
            got="numbers that are not finite, or too large for it",
            cause="the learning rate is too large",
            remedy="lower train.learning-rate, or use wire.precision = float32",
            public="an update is not finite",
        )
