"""The only reader of private data: rows of a JSON Lines, CSV or Parquet file as texts and labels.

Nothing here copies a text or a label into an error. What is wrong with a row is told by its line number and its kind,
so that the message may be read aloud. Its public form, which may leave the site, tells the kinds alone: a server that
chose the labels and were told lines or counts could ask for one row after the other.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from giva_core.config import DataConfig, TaskConfig
from giva_core.errors import ConfigError, DataError, DependencyError

#: How many bad rows an error names; the others are counted.
SHOWN_ROWS = 10

#: How many of the columns found an error names.
SHOWN_COLUMNS = 20

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_UTF8_BOM = b"\xef\xbb\xbf"

#: The line on which a row starts, and the row by column, or the kind of the fault that makes it unreadable.
_Row = tuple[int, Mapping[str, Any] | str]


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """The examples of one file, in file order. Its `repr` shows none of them.

    Attributes:
        texts: The texts, unchanged.
        text_pairs: The second texts, where the task has one.
        labels: int64 `(n,)` class ids in the order of `task.labels`; float32 `(n, C)` of 0 and 1 for multilabel;
            float32 `(n,)` for regression.
    """

    texts: tuple[str, ...]
    text_pairs: tuple[str, ...] | None
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Examples({len(self)} examples)"


class _BadRow(Exception):
    """A row cannot be used; its text is the kind of the fault, never a part of the row."""


def read_rows(path: str | Path, task: TaskConfig, data: DataConfig) -> Examples:
    """Read the examples of one file; its ending tells the format: `.jsonl`, `.csv` (with a header) or `.parquet`.

    UTF-8 with or without a byte order mark, lines ended by LF or CRLF; blank lines are no rows. Rows are read one by
    one, and all of them are checked before an error is raised.

    Args:
        path: The file.
        task: Kind of the task and the agreed labels.
        data: Names of the columns.

    Returns:
        All rows of the file.

    Raises:
        ConfigError: The task has no labels.
        DataError: The file is missing, empty, of an unknown format, lacks a column, or has rows that cannot be used.
        DependencyError: Parquet is asked for and pyarrow is not installed.
    """
    path = Path(path)
    parse_label = _label_parser(task)
    text_column, pair_column, label_column = data.text_column, data.text_pair_column, data.label_column
    needed = [column for column in (text_column, pair_column, label_column) if column]
    rows = _open(path, needed)

    texts: list[str] = []
    pairs: list[str] = []
    labels: list[Any] = []
    columns: dict[str, None] = {}
    faults = _Faults("row" if path.suffix.lower() == ".parquet" else "line")
    try:
        for line, row in rows:
            try:
                if isinstance(row, str):
                    raise _BadRow(row)
                columns.update(dict.fromkeys(row))
                text = _text(row, text_column, "text")
                pair = _text(row, pair_column, "second text") if pair_column else ""
                labels.append(parse_label(row, label_column))
            except _BadRow as fault:
                faults.add(line, str(fault))
                continue
            texts.append(text)
            pairs.append(pair)
    except FileNotFoundError:
        raise DataError(
            f"there is no data file {path}",
            cause="the path or the file's name is not the site's",
            remedy="set the site's data folder and data.train-file / data.eval-file to files that exist",
            public="the data file is missing",
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read",
            got=error.strerror,
            remedy="make it a file that this process may read",
            public="the data file cannot be read",
        ) from None
    if columns:
        _require_columns(path, needed, columns)
    faults.raise_if_any(path)
    if not texts:
        raise DataError(
            f"{path} holds no examples", expected="at least one row", public="the data file holds no examples"
        )
    kind = np.int64 if task.kind == "classification" else np.float32
    return Examples(tuple(texts), tuple(pairs) if pair_column else None, np.array(labels, dtype=kind))


# -- formats ----------------------------------------------------------------------------------------------------------


def _open(path: Path, needed: list[str]) -> Iterator[_Row]:
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path)
        case ".csv":
            return _read_csv(path, needed)
        case ".parquet":
            return _read_parquet(path, needed)
        case ending:
            raise DataError(
                f"{path} is in no known format",
                got=f"the ending '{ending}'",
                expected=".jsonl, .csv or .parquet",
                remedy="convert the file, or correct data.train-file / data.eval-file",
                public="the data file's format is not known",
            )


def _read_jsonl(path: Path) -> Iterator[_Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(_UTF8_BOM) if number == 1 else line
            if line.strip():
                yield number, _parse_json(line)


def _parse_json(line: bytes) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "row unreadable"
    return row if isinstance(row, dict) else "row unreadable"


def _read_csv(path: Path, needed: list[str]) -> Iterator[_Row]:
    with path.open("rb") as stream:
        # Bytes that are not UTF-8 pass as surrogates: they spoil their own row only, and never the count of the lines.
        lines = (
            (line.removeprefix(_UTF8_BOM) if number == 0 else line).decode("utf-8", errors="surrogateescape")
            for number, line in enumerate(stream)
        )
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:  # a quote that is not closed or is followed by text, or a cell beyond csv's size limit
                cells = None
            if cells == []:
                continue
            if not header:
                header = _csv_header(path, cells, needed)
            elif cells is None or len(cells) != len(header):
                yield start, "row unreadable"
            elif not _is_utf8("".join(cells)):
                yield start, "not UTF-8"
            else:
                yield start, dict(zip(header, cells, strict=True))


def _csv_header(path: Path, cells: list[str] | None, needed: list[str]) -> list[str]:
    if cells is None or not _is_utf8("".join(cells)):
        raise DataError(
            f"{path} has no readable header",
            expected="the names of the columns, as comma-separated UTF-8",
            remedy="save the file as 'CSV UTF-8'",
            public="the data file has no readable header",
        )
    header = [cell.strip() for cell in cells]
    _require_columns(path, needed, dict.fromkeys(header))
    _require_distinct(path, needed, header)
    return header


def _read_parquet(path: Path, needed: list[str]) -> Iterator[_Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DependencyError(
            "reading Parquet needs pyarrow, which is not installed",
            remedy="pip install 'fedgiva[parquet]'",
            public="the site cannot read Parquet",
        ) from None
    with path.open("rb") as stream:
        try:
            with parquet.ParquetFile(stream) as file:
                _require_columns(path, needed, dict.fromkeys(file.schema_arrow.names))
                _require_distinct(path, needed, file.schema_arrow.names)
                rows = (row for batch in file.iter_batches(columns=needed) for row in batch.to_pylist())
                yield from enumerate(rows, start=1)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError):  # their texts may quote the file
            raise DataError(
                f"{path} is not a readable Parquet file",
                cause="the file is of another format, cut off, or its text is not UTF-8",
                remedy="write it again",
                public="the data file is not readable Parquet",
            ) from None


def _require_columns(path: Path, needed: list[str], found: Mapping[str, None]) -> None:
    missing = [column for column in needed if column not in found]
    if missing:
        names = " and ".join(f"'{column}'" for column in missing)
        raise DataError(
            f"{path} has no column {names}",
            got=f"the columns {', '.join(map(repr, list(found)[:SHOWN_COLUMNS]))}",
            remedy="rename the column, or set data.text-column, data.text-pair-column and data.label-column",
            public="the data file lacks a column",
        )


def _require_distinct(path: Path, needed: list[str], header: list[str]) -> None:
    for column in needed:
        if header.count(column) > 1:
            raise DataError(
                f"{path} has the column '{column}' {header.count(column)} times",
                expected="once",
                remedy="rename the others",
                public="the data file has a column more than once",
            )


# -- cells ------------------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], column: str, what: str) -> str:
    text = row.get(column)
    if text is None:
        raise _BadRow(f"{what} missing")
    if not isinstance(text, str):
        raise _BadRow(f"{what} not a text")
    if not text.strip():
        raise _BadRow(f"{what} empty")
    if not _is_utf8(text):
        raise _BadRow("not UTF-8")
    return text


def _label_parser(task: TaskConfig) -> Callable[[Mapping[str, Any], str], Any]:
    if task.kind == "regression":
        return _number
    if not task.labels:
        raise ConfigError(
            f"a {task.kind} task needs its labels",
            got="task.labels is empty",
            expected="the labels that all sites agreed on",
            cause="labels are not collected from the sites, because each site may hold another part of them",
            remedy='set task.labels, e.g. labels = ["negative", "positive"] under [task]',
            public="task.labels is empty",
        )
    ids = {label.strip(): index for index, label in enumerate(task.labels)}

    def class_id(row: Mapping[str, Any], column: str) -> int:
        label = _name(_present(row, column))
        if not label:
            raise _BadRow("label missing")
        return _lookup(ids, label)

    def multi_hot(row: Mapping[str, Any], column: str) -> np.ndarray:
        value = _present(row, column)
        names = [_name(item) for item in value] if isinstance(value, list) else _name(value).split("|")
        target = np.zeros(len(task.labels), dtype=np.float32)
        target[[_lookup(ids, name.strip()) for name in names if name.strip()]] = 1.0
        return target

    return class_id if task.kind == "classification" else multi_hot


def _present(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise _BadRow("label missing")
    return value


def _name(value: Any) -> str:
    """A label as text; whole numbers serve as names, too, since JSON and Parquet often hold classes as such."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadRow("label not a name")
    return str(value).strip()


def _lookup(ids: Mapping[str, int], label: str) -> int:
    if label not in ids:
        raise _BadRow("label unknown")
    return ids[label]


def _number(row: Mapping[str, Any], column: str) -> float:
    value = _present(row, column)
    if isinstance(value, str) and not value.strip():
        raise _BadRow("label missing")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _FLOAT32_MAX:
        raise _BadRow("label not a finite number")
    return number


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
            expected="in every row a text and a label that the run's configuration agrees on",
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
