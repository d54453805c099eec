"""From the columns of a row to an example of its kind of task, and its label.

A new kind of task adds a function here that says which columns it needs and how a row of them is read. What cannot be
used raises `BadRow`, whose text is the kind of the fault and never a part of the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from giva_core.config import DataConfig, TaskConfig
from giva_core.errors import ConfigError
from giva_core.rows import Row, TextRow

from .file_formats import is_utf8

_FLOAT32_MAX = float(np.finfo(np.float32).max)

#: A row by column.
Columns = Mapping[str, Any]


class BadRow(Exception):
    """A row cannot be used; its text is the kind of the fault, never a part of the row."""


@dataclass(frozen=True)
class RowParser:
    """How the rows of one kind of task are read.

    Attributes:
        needed: The columns that every row has.
        settings: The settings that name them, for an error.
        parse: A row's example.
        label: A row's label.
        label_type: numpy's type of the labels.
    """

    needed: list[str]
    settings: str
    parse: Callable[[Columns], Row]
    label: Callable[[Columns], Any]
    label_type: type


def row_parser(task: TaskConfig, data: DataConfig) -> RowParser:
    """The parser of a run's rows.

    Raises:
        ConfigError: The task has no labels.
    """
    return _texts(task, data)


def _texts(task: TaskConfig, data: DataConfig) -> RowParser:
    text, pair = data.text_column, data.text_pair_column
    label_of = _label_parser(task)

    def parse(row: Columns) -> Row:
        return TextRow(text_of(row, text, "text"), text_of(row, pair, "second text") if pair else None)

    return RowParser(
        needed=[column for column in (text, pair, data.label_column) if column],
        settings="data.text-column, data.text-pair-column and data.label-column",
        parse=parse,
        label=lambda row: label_of(row, data.label_column),
        label_type=np.int64 if task.kind == "classification" else np.float32,
    )


# -- cells ------------------------------------------------------------------------------------------------------------


def text_of(row: Columns, column: str, what: str) -> str:
    """A text cell that is there, is not blank, and is UTF-8."""
    text = row.get(column)
    if text is None:
        raise BadRow(f"{what} missing")
    if not isinstance(text, str):
        raise BadRow(f"{what} not a text")
    if not text.strip():
        raise BadRow(f"{what} empty")
    if not is_utf8(text):
        raise BadRow("not UTF-8")
    return text


def _label_parser(task: TaskConfig) -> Callable[[Columns, str], Any]:
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

    def class_id(row: Columns, column: str) -> int:
        label = _name(_present(row, column))
        if not label:
            raise BadRow("label missing")
        return _lookup(ids, label)

    def multi_hot(row: Columns, column: str) -> np.ndarray:
        value = _present(row, column)
        names = [_name(item) for item in value] if isinstance(value, list) else _name(value).split("|")
        target = np.zeros(len(task.labels), dtype=np.float32)
        target[[_lookup(ids, name.strip()) for name in names if name.strip()]] = 1.0
        return target

    return class_id if task.kind == "classification" else multi_hot


def _present(row: Columns, column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise BadRow("label missing")
    return value


def _name(value: Any) -> str:
    """A label as text; whole numbers serve as names, too, since JSON and Parquet often hold classes as such."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("label not a name")
    return str(value).strip()


def _lookup(ids: Mapping[str, int], label: str) -> int:
    if label not in ids:
        raise BadRow("label unknown")
    return ids[label]


def _number(row: Columns, column: str) -> float:
    value = _present(row, column)
    if isinstance(value, str) and not value.strip():
        raise BadRow("label missing")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _FLOAT32_MAX:
        raise BadRow("label not a finite number")
    return number
