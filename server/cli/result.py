"""Shows a `Report`: tables for people, or one line of JSON for programs."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from giva_core.report import Report, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

#: Version of the JSON envelope; a program that reads it should check.
SCHEMA = 1

_WIDE = 100_000  # columns; nothing is wrapped or cut where no terminal limits the width
_FOLDED = 32  # columns of a text in a terminal that is too narrow for its table


class Bytes(int):
    """A number of bytes in a table cell, shown as KiB, MiB, ..."""


def show(report: Report, as_json: bool) -> None:
    """Write a report to stdout."""
    if as_json:
        text = _line(report.kind, report.data)
    else:
        parts = [_table_text(table) for table in report.tables]
        parts += ["\n".join(printable(note, keep="\n\t") for note in report.notes)] if report.notes else []
        text = "\n\n".join(parts)
    if text:
        sys.stdout.write(text + "\n")
    sys.stdout.flush()  # here, so that a closed pipe is noticed while it can still be handled


def error_line(kind: str, message: str) -> str:
    """The JSON line of an error."""
    return _line("error", {"kind": kind, "message": message})


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters written out: names and reasons come from other machines, terminals obey them."""
    return "".join(char if char.isprintable() or char in keep else f"\\x{ord(char):02x}" for char in text)


def cell_text(value: Any) -> str:
    """A table cell for people: `-` where empty, 4 significant digits."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Bytes):
        return bytes_text(value)
    if isinstance(value, float):
        return number_text(value)
    return printable(str(value))


def number_text(value: float) -> str:
    """4 significant digits: `0.8125`, `1.500`, `12346`, `2.500e-06`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.3e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")


def bytes_text(count: int) -> str:
    """`512 B`, `1.500 KiB`, `81.56 MiB`."""
    if count < 1024:
        return f"{int(count)} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{number_text(count / 1024**power)} {'KMGT'[power - 1]}iB"


def plain(value: Any) -> Any:
    """`value` as JSON knows it: numpy scalars as numbers, NaN and infinities as None, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # numpy, which is not imported for this
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(kind: str, data: Mapping[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA, "kind": kind, "data": plain(data)}, allow_nan=False, ensure_ascii=False)


def _table_text(table: Table) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    terminal = sys.stdout.isatty()
    console = Console(file=buffer, width=_WIDE, force_terminal=terminal, no_color=None if terminal else True)
    if table.title:
        console.print(printable(table.title), style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(_rich_table(table, Console().width if terminal else None))
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip("\n").split("\n"))


def _rich_table(table: Table, limit: int | None) -> RichTable:
    """The table; where `limit` columns are too few, headings and long texts are folded, but nothing is cut."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD if limit else None, pad_edge=False, show_header=any(table.columns))
    cells = [[cell_text(cell) for cell in row] for row in table.rows]
    widths = [max([len(column), *map(len, texts)]) for column, *texts in zip(table.columns, *cells, strict=True)]
    narrow = limit is not None and sum(widths) + 3 * len(widths) > limit
    for index, column in enumerate(table.columns):
        numeric = all(isinstance(row[index], int | float | None) for row in table.rows)
        shown.add_column(
            Text(column.replace(" ", "\n") if narrow else column),
            justify="right" if numeric else "left",
            vertical="bottom" if narrow else "top",
            overflow="fold",
            max_width=_FOLDED if narrow and index else None,
        )
    for row in cells:
        shown.add_row(*map(Text, row))
    return shown
