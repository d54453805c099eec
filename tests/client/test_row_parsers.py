"""What a row of each kind of task holds, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data import read_rows
from giva_core.config import DataConfig, TaskConfig
from giva_core.errors import ConfigError, DataError, public_reason
from giva_core.rows import Dialogue

PLAIN, CHAT = TaskConfig(kind="causal-lm"), TaskConfig(kind="causal-lm", prompt_format="chat")
DATA, MESSAGES = DataConfig(), DataConfig(messages_column="messages")
SECRET = "Zyxwvut"


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} {SECRET}"} for role in roles]}


def test_prompts_completions_and_options(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "1 + 1 =", "completion": "2"},
        {"prompt": "or?", "completion": "b", "options": ["a", "b"]},
        {"prompt": "or?", "completion": "c", "options": "c|d"},
    )
    examples = read_rows(path, PLAIN, DATA)
    assert examples.rows[0] == Dialogue((("user", "1 + 1 ="), ("assistant", "2")))
    assert [row.options for row in examples.rows if isinstance(row, Dialogue)] == [(), ("a", "b"), ("c", "d")]
    assert examples.labels.dtype == np.int64 and examples.labels.tolist() == [-1, 1, 0]
    assert "or?" not in repr(examples.rows) and repr(examples.rows[0]) == "Dialogue(...)"


def test_options_of_a_parquet_file_are_read_where_they_are(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"prompt": ["a"], "completion": ["yes"], "other": [1]}
    parquet.write_table(pyarrow.table(table), tmp_path / "plain.parquet")
    parquet.write_table(pyarrow.table({**table, "options": [["no", "yes"]]}), tmp_path / "choice.parquet")
    assert read_rows(tmp_path / "plain.parquet", PLAIN, DATA).labels.tolist() == [-1]
    assert read_rows(tmp_path / "choice.parquet", PLAIN, DATA).labels.tolist() == [1]


def test_chats_keep_their_turns(tmp_path: Path) -> None:
    path = written(tmp_path, chat("user", "assistant"), chat("system", "user", "assistant", "user", "assistant"))
    rows = read_rows(path, CHAT, MESSAGES).rows
    assert [len(row.turns) for row in rows if isinstance(row, Dialogue)] == [2, 5]
    table = tmp_path / "rows.csv"
    cell = json.dumps(chat("user", "assistant")["messages"]).replace('"', '""')
    table.write_text(f'messages\n"{cell}"\n', encoding="utf-8")
    assert read_rows(table, CHAT, MESSAGES).rows == rows[:1]


@pytest.mark.parametrize(
    ("task", "data", "row", "kind"),
    [
        (PLAIN, DATA, {"prompt": SECRET}, "completion missing"),
        (PLAIN, DATA, {"prompt": " ", "completion": SECRET}, "prompt empty"),
        (PLAIN, DATA, {"prompt": "a", "completion": SECRET, "options": ["b", "c"]}, "answer not one of the options"),
        (PLAIN, DATA, {"prompt": "a", "completion": "b", "options": ["b", "b"]}, "answer not one of the options"),
        (PLAIN, DATA, {"prompt": "a", "completion": "b", "options": [SECRET, 3]}, "options not a list of texts"),
        (CHAT, MESSAGES, {"messages": SECRET}, "chat not a list of messages"),
        (CHAT, MESSAGES, {"messages": []}, "chat not of user and assistant in turn"),
        (CHAT, MESSAGES, chat("user"), "chat not of user and assistant in turn"),
        (CHAT, MESSAGES, chat("assistant", "user"), "chat not of user and assistant in turn"),
        (CHAT, MESSAGES, {"messages": [{"role": "user", "content": None}]}, "message missing"),
    ],
)
def test_unusable_rows_are_told_by_their_kind(
    tmp_path: Path, task: TaskConfig, data: DataConfig, row: dict[str, Any], kind: str
) -> None:
    sound = chat("user", "assistant") if data is MESSAGES else {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=kind) as caught:
        read_rows(written(tmp_path, sound, row), task, data)
    assert SECRET not in str(caught.value) and "line 2" in str(caught.value)
    assert kind in public_reason(caught.value) and "2" not in public_reason(caught.value)


def test_chats_need_a_run_of_chats(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts are plain.*prompt-format = chat"):
        read_rows(written(tmp_path, chat("user", "assistant")), PLAIN, MESSAGES)
