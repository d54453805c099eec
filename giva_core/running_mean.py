"""A weighted mean that is summed as its terms come, and is the same to the last bit in whatever order they come.

Floating sums depend on their order, so a server that sums in a fixed order has to keep every update until the last one
is there. Exact sums do not. A float32 number times an integer weight has few enough bits for float64; it is cut, on a
grid of powers of two that is the same for all numbers, into digits of 40 bits, and sums of integers below 2^53 are
exact in float64 (a superaccumulator: Kulisch, "Computer Arithmetic and Validity", 2008; reproducible summation on a
fixed grid: Demmel and Nguyen, ARITH 2013). Only digits that occur take memory: three for the numbers of a model, so 24
bytes a number, however many sites there are. Arrays are summed piece by piece, since each step has a float64 copy or
two of what it works on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from .errors import UpdateError
from .types import Arrays

_BITS = 40
_LOWEST = -152  # below float32's smallest number, 2^-149
_PLACES = 9  # up to 2^(-152 + 9 * 40) = 2^208, above float32's largest times any weight
_LARGEST_WEIGHT = 2**28  # times a float32, exact in float64; a larger weight is added in parts
_CARRY_AFTER = 2**11  # terms, after which a digit may have 2^52
_PIECE = 2**16  # numbers of an array that are summed together

#: The digits of a piece's sums, by place.
_Digits = dict[int, np.ndarray]


class RunningMean:
    """`Σ w_k x_k / Σ w_k` by name, exact until the division, returned as float32.

    The mean of one update is that update, bit for bit, and so is the mean of equal ones.
    """

    def __init__(self) -> None:
        self._digits: dict[str, list[_Digits]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._alone: Arrays | None = None  # a single update, whose mean is itself down to the sign of a zero
        self._weight = 0
        self._terms = 0

    def add(self, arrays: Mapping[str, np.ndarray], weight: int) -> None:
        """Add one update.

        Args:
            arrays: Finite float32 arrays; names and shapes as of the first update.
            weight: Its training examples.

        Raises:
            UpdateError: A weight below one, or arrays that do not fit the first update's.
        """
        if weight < 1:
            raise UpdateError("an update has no weight", got=weight, expected="at least one example")
        shapes = {name: array.shape for name, array in arrays.items()}
        if not self._weight:
            self._shapes = shapes
            self._digits = {name: [{} for _ in _pieces(array)] for name, array in arrays.items()}
            self._alone = {name: np.array(array, np.float32) for name, array in arrays.items()}
        for name, shape in self._shapes.items():
            if shapes.keys() != self._shapes.keys() or shapes[name] != shape:
                raise UpdateError(f"the updates do not all have the array '{name}' in shape {shape}")
        if self._weight:
            self._alone = None
        for part in (weight // _LARGEST_WEIGHT * _LARGEST_WEIGHT, weight % _LARGEST_WEIGHT):
            if part:
                for name, array in arrays.items():
                    for digits, piece in zip(self._digits[name], _pieces(array), strict=True):
                        _add(digits, piece.astype(np.float64) * float(part))
                self._terms += 1
        self._weight += weight
        if self._terms >= _CARRY_AFTER:
            for digits in itertools.chain.from_iterable(self._digits.values()):
                _carry(digits)
            self._terms = 1

    def mean(self) -> Arrays:
        """The mean of what was added so far.

        Raises:
            UpdateError: Nothing was added.
        """
        if not self._weight:
            raise UpdateError("there is nothing to average", expected="at least one update")
        if self._alone is not None:
            return {name: array.copy() for name, array in self._alone.items()}
        means: Arrays = {}
        for name, pieces in self._digits.items():
            means[name] = np.zeros(self._shapes[name], np.float32)
            for digits, mean in zip(pieces, _pieces(means[name]), strict=True):
                _carry(digits)  # the digits of a number are unique then, whatever the order of its terms
                total = np.zeros(len(mean))
                for place in sorted(digits):
                    total = total + np.ldexp(digits[place], _exponent(place))
                mean[:] = total / float(self._weight)
        self._terms = 1
        return means


def _pieces(array: np.ndarray) -> list[np.ndarray]:
    """The numbers of an array in the order of memory, a few at a time; views where it is contiguous."""
    flat = array.reshape(-1)
    return [flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE)]


def _exponent(place: int) -> int:
    return _LOWEST + _BITS * place


def _add(digits: _Digits, rest: np.ndarray) -> None:
    """Add numbers, cut into digits from the highest place on; `rest` is used up."""
    largest = float(np.max(np.abs(rest), initial=0.0))
    if not largest:
        return
    place = min(_PLACES - 1, (int(np.frexp(largest)[1]) - _LOWEST) // _BITS)
    while place >= 0:
        codes = np.rint(np.ldexp(rest, -_exponent(place)))
        if codes.any():
            rest = rest - np.ldexp(codes, _exponent(place))
            digits[place] = digits[place] + codes if place in digits else codes
            if not rest.any():
                return
        place -= 1


def _carry(digits: _Digits) -> None:
    """Bring every digit into [-2^39, 2^39), from the lowest place on."""
    for place in range(_PLACES - 1):
        if place in digits:
            up = np.floor(np.ldexp(digits[place], -_BITS) + 0.5)
            if up.any():
                digits[place] = digits[place] - np.ldexp(up, _BITS)
                digits[place + 1] = digits[place + 1] + up if place + 1 in digits else up
