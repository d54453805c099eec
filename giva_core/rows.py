"""One example of each kind of task, as it was read and before it is numbers. No `repr` shows what is inside."""

from __future__ import annotations

from dataclasses import dataclass


class _Hidden:
    """Data that no log and no traceback prints."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"


@dataclass(frozen=True, repr=False, slots=True)
class TextRow(_Hidden):
    """A text, and perhaps a second one, whose label stands beside it."""

    text: str
    pair: str | None = None


@dataclass(frozen=True, repr=False, slots=True)
class Dialogue(_Hidden):
    """A chat that ends with the answer to be learned; a prompt and its completion are the shortest one.

    Attributes:
        turns: Role (`system`, `user`, `assistant`) and content of each message; the last is the assistant's.
        options: The possible answers, the right one among them; empty where there is no choice.
    """

    turns: tuple[tuple[str, str], ...]
    options: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The content of the last message."""
        return self.turns[-1][1]


@dataclass(frozen=True, repr=False, slots=True)
class ImageRow(_Hidden):
    """An image, as the bytes of its file."""

    data: bytes


Row = TextRow | Dialogue | ImageRow
