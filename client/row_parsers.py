"""From the columns of a row to an example of its kind of task, and its label.

A new kind of task adds a function here that says which columns it needs and how a row of them is read. What cannot be
used raises `BadRow`, whose text is the kind of the fault and never a part of the row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from giva_core.config import ANSWER_TASKS, DataConfig, TaskConfig
from giva_core.errors import ConfigError
from giva_core.rows import Dialogue, ImageRow, Row, TextRow

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
        optional: Columns that a row may have.
        image_columns: The columns of image and label, where rows are images.
    """

    needed: list[str]
    settings: str
    parse: Callable[[Columns], Row]
    label: Callable[[Columns], Any]
    label_type: type
    optional: tuple[str, ...] = ()
    image_columns: tuple[str, str] | None = None


def row_parser(task: TaskConfig, data: DataConfig) -> RowParser:
    """The parser of a run's rows.

    Raises:
        ConfigError: The task has no labels, or the columns are not those of its format.
    """
    if task.kind in ANSWER_TASKS:
        return _answers(task, data)
    return _images(task, data) if task.kind == "image-classification" else _texts(task, data)


def column_sets(data: DataConfig) -> list[list[str]]:
    """The columns that rows of one kind of task or another have, the commonest kind first."""
    if data.messages_column:
        return answer_columns(data)
    texts = [column for column in (data.text_column, data.text_pair_column, data.label_column) if column]
    return [texts, *answer_columns(data), [data.image_column, data.label_column]]


def answer_columns(data: DataConfig) -> list[list[str]]:
    """Those of rows whose answers are texts."""
    return [[data.messages_column]] if data.messages_column else [[data.prompt_column, data.completion_column]]


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


def _answers(task: TaskConfig, data: DataConfig) -> RowParser:
    if data.messages_column and task.prompt_format != "chat":
        raise ConfigError(
            "data.messages-column holds chats, and the run's prompts are plain",
            got=f"task.prompt-format = {task.prompt_format}",
            expected="chat",
            remedy="set task.prompt-format = chat, or data.prompt-column and data.completion-column",
            public="the site has chats, the run has plain prompts",
        )

    def parse(row: Columns) -> Dialogue:
        if data.messages_column:
            turns = _turns(row, data.messages_column)
        else:
            prompt = text_of(row, data.prompt_column, "prompt")
            turns = (("user", prompt), ("assistant", text_of(row, data.completion_column, "completion")))
        return Dialogue(turns, _options(row, data.options_column))

    def label(row: Columns) -> int:
        example = parse(row)
        if not example.options:
            return -1
        names = [option.strip() for option in example.options]
        if names.count(example.answer.strip()) != 1:
            raise BadRow("answer not one of the options")
        return names.index(example.answer.strip())

    needed = [data.messages_column] if data.messages_column else [data.prompt_column, data.completion_column]
    return RowParser(
        needed=needed,
        settings="data.prompt-column and data.completion-column, or data.messages-column",
        parse=parse,
        label=label,
        label_type=np.int64,
        optional=(data.options_column,) if data.options_column else (),
    )


def _images(task: TaskConfig, data: DataConfig) -> RowParser:
    label_of = _label_parser(task)

    def parse(row: Columns) -> ImageRow:
        found = row.get(data.image_column)
        if isinstance(found, dict):  # as Hugging Face's datasets writes an image: bytes, and the name they came from
            found = found.get("bytes")
        if found is None:
            raise BadRow("image missing")
        if not isinstance(found, bytes) or not found:
            raise BadRow("image not the bytes of a file")
        return ImageRow(found)

    return RowParser(
        needed=[data.image_column, data.label_column],
        settings="data.image-column and data.label-column",
        parse=parse,
        label=lambda row: label_of(row, data.label_column),
        label_type=np.int64,
        image_columns=(data.image_column, data.label_column),
    )


def _turns(row: Columns, column: str) -> tuple[tuple[str, str], ...]:
    """The messages of a chat, which alternate between user and assistant after an opening by the system, if any."""
    messages = row.get(column)
    if isinstance(messages, str):  # a cell of a CSV file
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            messages = None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("chat not a list of messages")
    turns = tuple((str(message.get("role")), text_of(message, "content", "message")) for message in messages)
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadRow("chat not of user and assistant in turn, the assistant last")
    return turns


def _options(row: Columns, column: str) -> tuple[str, ...]:
    found = row.get(column) if column else None
    if found is None or found == "":
        return ()
    options = found.split("|") if isinstance(found, str) else found
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise BadRow("options not a list of texts")
    return tuple(options)


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

    return multi_hot if task.kind == "multilabel" else class_id


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
