"""What a command has to say, apart from how it is shown: one value, text for people and JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows for people. Cells are str, int, float, bool or None; the renderer formats them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Report:
    """The answer of one command.

    Attributes:
        kind: Stable name of the answer's form, e.g. `run-list`; programs switch on it.
        data: JSON-able content, complete.
        tables: The same for people.
        notes: Sentences for people, below the tables.
        exit_code: 0 done, 1 failed, 2 usage, 3 partial.
    """

    kind: str
    data: Mapping[str, Any]
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    exit_code: int = field(default=0)
