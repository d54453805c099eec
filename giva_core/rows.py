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


Row = TextRow
