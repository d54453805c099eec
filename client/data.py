"""The only reader of private data: the rows of a file as examples and labels.

Nothing here copies a text or a label into an error. What is wrong with a row is told by its line number and its kind,
so that the message may be read aloud. Its public form, which may leave the site, tells the kinds alone: a server that
chose the labels and were told lines or counts could ask for one row after the other.

`file_formats.py` opens files, `row_parsers.py` says what a row of each kind of task holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from giva_core.config import DataConfig, TaskConfig
from giva_core.errors import DataError
from giva_core.rows import Row

from .file_formats import FoundRow, open_rows, require_columns
from .row_parsers import BadRow, row_parser

#: How many bad rows an error names; the others are counted.
SHOWN_ROWS = 10


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """The examples of one file, in file order. Its `repr` shows none of them.

    Attributes:
        rows: The examples, unchanged, each of its kind's type in `giva_core.rows`.
        labels: int64 `(n,)` class ids in the order of `task.labels`; float32 `(n, C)` of 0 and 1 for multilabel;
            float32 `(n,)` for regression; int64 `(n,)` for answers: the right option, -1 without options.
    """

    rows: tuple[Row, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Examples({len(self)} examples)"


class RowStream:
    """The examples of one file, one after the other as they are read; `labels` are those of the examples so far.

    Its ending tells the format: `.jsonl`, `.csv` (with a header) or `.parquet`. Images may also lie in a folder, in a
    sub-folder for each label. UTF-8 with or without a byte order mark, lines ended by LF or CRLF; blank lines are no
    rows. What is wrong is told behind the last example, when all rows have been checked.

    Args:
        path: The file.
        task: Kind of the task and the agreed labels.
        data: Names of the columns.

    Raises:
        ConfigError: The task has no labels.
        DataError: While it is read: the file is missing, empty, of an unknown format, lacks a column, or has rows that
            cannot be used.
        DependencyError: While it is read: Parquet is asked for and pyarrow is not installed.
    """

    def __init__(self, path: str | Path, task: TaskConfig, data: DataConfig) -> None:
        self._path = Path(path)
        self._parser = row_parser(task, data)
        self._labels: list[Any] = []

    @property
    def labels(self) -> np.ndarray:
        """As in `Examples`."""
        return np.array(self._labels, dtype=self._parser.label_type)

    def __iter__(self) -> Iterator[Row]:
        path, parser = self._path, self._parser
        columns: dict[str, None] = {}
        faults = _Faults({".parquet": "row", "": "image"}.get(path.suffix.lower(), "line"))
        for line, row in self._found():
            try:
                if isinstance(row, str):
                    raise BadRow(row)
                columns.update(dict.fromkeys(row))
                example, label = parser.parse(row), parser.label(row)
            except BadRow as fault:
                faults.add(line, str(fault))
                continue
            self._labels.append(label)
            yield example
        if columns:
            require_columns(path, parser.needed, columns, parser.settings)
        faults.raise_if_any(path)
        if not self._labels:
            raise DataError(
                f"{path} holds no examples", expected="at least one row", public="the data file holds no examples"
            )

    def _found(self) -> Iterator[FoundRow]:
        path, parser = self._path, self._parser
        try:
            yield from open_rows(path, parser.needed, parser.settings, parser.optional, parser.image_columns)
        except FileNotFoundError:
            raise DataError(
                f"there is no data file {path}",
                cause="the path or the file's name is not the site's",
                remedy="set the site's data folder and data.train-file / data.eval-file to files that exist; "
                "data.eval-file may be empty for no evaluation",
                public="the data file is missing",
            ) from None
        except OSError as error:
            raise DataError(
                f"{path} cannot be read",
                got=error.strerror,
                remedy="make it a file that this process may read",
                public="the data file cannot be read",
            ) from None


def read_rows(path: str | Path, task: TaskConfig, data: DataConfig) -> Examples:
    """All examples of one file, as `RowStream` reads them; its arguments and errors."""
    stream = RowStream(path, task, data)
    return Examples(tuple(stream), stream.labels)


class _Faults:
    """Bad rows: how many of each kind, and where the first ones are."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[int]] = {}

    def add(self, line: int, kind: str) -> None:
        if self._counts.total() < SHOWN_ROWS:
            self._first.setdefault(kind, []).append(line)
        self._counts[kind] += 1

    def raise_if_any(self, path: Path) -> None:
        total = self._counts.total()
        if not total:
            return
        rows = "1 row" if total == 1 else f"{total} rows"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._counts.most_common())
        shown = [f"{self._place} {line}: {kind}" for kind, lines in self._first.items() for line in lines]
        rest = f", and {total - len(shown)} more" if total > len(shown) else ""
        summary = f"{rows} ({kinds}): {', '.join(shown)}{rest}"
        raise DataError(
            f"{path} has rows that cannot be used",
            got=summary,
            expected="in every row what the task needs, and what the run's configuration agrees on",
            cause=self._cause(),
            remedy="correct or remove these rows",
            public=f"unusable rows ({', '.join(sorted(self._counts))})",
        )

    def _cause(self) -> str | None:
        if self._counts["label unknown"]:
            return "task.labels lacks a label or spells it otherwise"
        if self._counts["not UTF-8"]:
            return "the file was saved in another encoding"
        if self._counts["row unreadable"]:
            return "a line is not one JSON object, or a cell with commas, quotes or line breaks is not quoted"
        return None
