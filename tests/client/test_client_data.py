"""Reading private data: every format, every fault, and nothing of the data in what leaves."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest

from client.data import SHOWN_ROWS, Examples, read_rows
from giva_core.config import DataConfig, TaskConfig
from giva_core.errors import ConfigError, DataError, DependencyError, public_reason
from giva_core.rows import TextRow

COLOURS = TaskConfig(labels=("red", "green", "blue"))
TAGS = TaskConfig(kind="multilabel", labels=("red", "green", "blue"))
SCORE = TaskConfig(kind="regression")
DATA = DataConfig()
PAIRED = DataConfig(text_pair_column="other")

#: Stands for a patient's text or label: no error may show it.
SECRET = "Zyxwvut"


def jsonl(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def csv(folder: Path, content: bytes | str) -> Path:
    path = folder / "rows.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(path: Path, task: TaskConfig = COLOURS, data: DataConfig = DATA) -> DataError:
    """The error that reading gives; its public form never names the file or shows the data."""
    with pytest.raises(DataError) as caught:
        read_rows(path, task, data)
    error = caught.value
    assert error.public and SECRET not in str(error) and SECRET not in public_reason(error)
    assert path.name not in error.public and str(path.parent) not in error.public
    return error


def texts(examples: Examples) -> tuple[str, ...]:
    return tuple(row.text for row in examples.rows if isinstance(row, TextRow))


# -- what is read -----------------------------------------------------------------------------------------------------


def test_jsonl_classification_ids_follow_the_order_of_the_labels(tmp_path: Path) -> None:
    pairs = ((" a ", "blue"), ("b", " red "), ("c", "blue"))
    path = jsonl(tmp_path, *({"text": text, "label": label} for text, label in pairs))
    examples = read_rows(path, COLOURS, DATA)
    assert texts(examples) == (" a ", "b", "c") and len(examples) == 3
    assert examples.labels.dtype == np.int64
    np.testing.assert_array_equal(examples.labels, [2, 0, 2])


def test_a_whole_number_is_a_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "label": 1}, {"text": "b", "label": "0"})
    np.testing.assert_array_equal(read_rows(path, TaskConfig(labels=("0", "1")), DATA).labels, [1, 0])


def test_multilabel_takes_lists_and_text_and_none_of_them(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"text": "a", "label": ["blue", " red"]},
        {"text": "b", "label": "green | blue"},
        {"text": "c", "label": []},
        {"text": "d", "label": ""},
    )
    labels = read_rows(path, TAGS, DATA).labels
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, [[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0]])


def test_regression_takes_numbers_and_their_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "label": 2}, {"text": "b", "label": -0.5}, {"text": "c", "label": " 1e-3 "})
    labels = read_rows(path, SCORE, DATA).labels
    assert labels.dtype == np.float32 and labels.shape == (3,)
    np.testing.assert_allclose(labels, [2, -0.5, 1e-3])


def test_second_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "other": "b", "label": "red"}, {"text": "c", "other": "d", "label": "red"})
    assert [row.pair for row in read_rows(path, COLOURS, PAIRED).rows] == ["b", "d"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_and_line_ends_do_not_matter(tmp_path: Path, mark: bytes, end: str) -> None:
    table = csv(tmp_path, mark + end.join(["text,label", "grün,red", '"b, c",blue', ""]).encode())
    rows = ['{"text": "grün", "label": "red"}', "", '{"text": "b, c", "label": "blue"}']
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(mark + end.join(rows).encode())
    for path in (table, lines):
        examples = read_rows(path, COLOURS, DATA)
        assert texts(examples) == ("grün", "b, c")
        np.testing.assert_array_equal(examples.labels, [0, 2])


def test_csv_keeps_quoted_line_breaks_and_other_columns_may_stay(tmp_path: Path) -> None:
    path = csv(tmp_path, 'id, label ,text\n1,red,"two\nlines, ""quoted"""\n2,green,b\n')
    examples = read_rows(path, COLOURS, DATA)
    assert texts(examples) == ('two\nlines, "quoted"', "b")
    np.testing.assert_array_equal(examples.labels, [0, 1])


def test_parquet_with_lists_numbers_and_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"text": ["a", "b"], "tags": [["red", "blue"], []], "class": [1, 0], "score": [0.5, 2.0]}
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    np.testing.assert_array_equal(read_rows(path, TAGS, DataConfig(label_column="tags")).labels, [[1, 0, 1], [0, 0, 0]])
    numbered = TaskConfig(labels=("0", "1"))
    np.testing.assert_array_equal(read_rows(path, numbered, DataConfig(label_column="class")).labels, [1, 0])
    np.testing.assert_array_equal(read_rows(path, SCORE, DataConfig(label_column="score")).labels, [0.5, 2.0])


def test_repr_shows_no_example() -> None:
    assert repr(Examples((TextRow(SECRET),), np.array([0]))) == "Examples(1 examples)"
    assert repr(TextRow(SECRET, SECRET)) == "TextRow(...)"


# -- faults of a row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "task"),
    [
        ({"text": SECRET, "label": "purple"}, "label unknown", COLOURS),
        ({"text": "a", "label": SECRET}, "label unknown", COLOURS),
        ({"text": SECRET, "label": ["red", SECRET]}, "label unknown", TAGS),
        ({"text": SECRET, "label": f"red|{SECRET}"}, "label unknown", TAGS),
        ({"text": SECRET, "label": ""}, "label missing", COLOURS),
        ({"text": SECRET, "label": None}, "label missing", TAGS),
        ({"text": SECRET}, "label missing", COLOURS),
        ({"text": SECRET, "label": True}, "label not a name", COLOURS),
        ({"text": SECRET, "label": {SECRET: 1}}, "label not a name", TAGS),
        ({"text": SECRET, "label": " "}, "label missing", SCORE),
        ({"text": SECRET, "label": SECRET}, "label not a finite number", SCORE),
        ({"text": SECRET, "label": "nan"}, "label not a finite number", SCORE),
        ({"text": SECRET, "label": float("inf")}, "label not a finite number", SCORE),
        ({"text": SECRET, "label": 1e39}, "label not a finite number", SCORE),
        ({"text": SECRET, "label": False}, "label not a finite number", SCORE),
        ({"text": " \n ", "label": SECRET}, "text empty", COLOURS),
        ({"text": None, "label": SECRET}, "text missing", COLOURS),
        ({"label": SECRET}, "text missing", COLOURS),
        ({"text": [SECRET], "label": "red"}, "text not a text", COLOURS),
        ({"text": f"{SECRET}\ud800", "label": "red"}, "not UTF-8", COLOURS),
        ([SECRET], "row unreadable", COLOURS),
    ],
)
def test_a_bad_row_is_told_by_line_and_kind(tmp_path: Path, row: object, kind: str, task: TaskConfig) -> None:
    good = {"text": "fine", "label": "1" if task is SCORE else "red"}
    error = fault(jsonl(tmp_path, good, row, good), task)
    assert error.public == f"unusable rows ({kind})"
    assert f"1 row (1 {kind}): line 2: {kind}" in str(error) and "rows.jsonl" in str(error)


def test_the_second_text_is_checked_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "other": "b", "label": "red"}, {"text": SECRET, "other": "", "label": "red"})
    assert "line 2: second text empty" in str(fault(path, data=PAIRED))


def test_lines_that_are_no_json_or_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = b'{"text": "a", "label": "red"}'
    cut = b'{"text": "' + SECRET.encode()
    latin = b'{"text": "\xfcber ' + SECRET.encode() + b'"}'
    path.write_bytes(b"\n".join([good, cut, b"", latin, b"[" * 100_000]))
    error = fault(path)
    assert "3 rows (2 row unreadable, 1 not UTF-8)" in str(error)
    assert "line 2: row unreadable, line 5: row unreadable, line 4: not UTF-8" in str(error)
    assert error.public == "unusable rows (not UTF-8, row unreadable)"


def test_all_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    pairs = [(SECRET, SECRET)] * 9 + [("", "red")] * 4 + [("a", "red")]
    rows = [{"text": text, "label": label} for text, label in pairs]
    error = fault(jsonl(tmp_path, *rows))
    assert "13 rows (9 label unknown, 4 text empty)" in str(error)
    assert str(error).count("line ") == SHOWN_ROWS == 10 and "line 10: text empty, and 3 more" in str(error)


def test_what_leaves_tells_neither_how_many_rows_are_bad_nor_which(tmp_path: Path) -> None:
    few, many = [("", "red"), ("a", SECRET)], [("a", "red"), ("b", SECRET), ("", "red"), ("c", "c"), ("", "red")]
    reasons = {
        fault(jsonl(tmp_path, *({"text": text, "label": label} for text, label in rows))).public for rows in (few, many)
    }
    assert reasons == {"unusable rows (label unknown, text empty)"}


def test_csv_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    rows = ["text,label", f'"{SECRET}\n\n{SECRET}",red', "", f"{SECRET},purple\r", f'"a\nb",{SECRET}', "c,blue", ",red"]
    told = str(fault(csv(tmp_path, "\n".join(rows))))
    assert "line 6: label unknown, line 7: label unknown, line 10: text empty" in told


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"text,label\na,red\n{SECRET}, with a comma,red\nb,blue\n", "line 3: row unreadable"),
        (f"text,label\na,red\n{SECRET}\n", "line 3: row unreadable"),
        (f'text,label\na,red\n"{SECRET}" again,red\nb,blue\n', "line 3: row unreadable"),
        (f'text,label\na,red\n"{SECRET},red\nb,blue\n', "line 3: row unreadable"),
        (b"text,label\na,red\n\xfcber " + SECRET.encode() + b",red\nb,blue\n", "line 3: not UTF-8"),
    ],
)
def test_bad_csv_rows(tmp_path: Path, content: bytes | str, expected: str) -> None:
    assert expected in str(fault(csv(tmp_path, content)))


def test_parquet_counts_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", SECRET, None], "label": ["red", SECRET, "red"]}), path)
    assert "row 2: label unknown, row 3: text missing" in str(fault(path))


# -- faults of a file -------------------------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert fault(tmp_path / "rows.jsonl").public == "the data file is missing"
    (tmp_path / "folder.csv").mkdir()
    assert fault(tmp_path / "folder.csv").public == "the data file cannot be read"


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.csv", b""), ("a.csv", b"text,label\n")]
)
def test_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert fault(tmp_path / name).public == "the data file holds no examples"


def test_unknown_ending(tmp_path: Path) -> None:
    error = fault(tmp_path / "rows.xlsx")
    assert ".jsonl, .csv or .parquet" in str(error) and error.public == "the data file's format is not known"


def test_missing_column_names_the_columns_found_only_locally(tmp_path: Path) -> None:
    table = csv(tmp_path, "Text,label\na,red\n")
    lines = jsonl(tmp_path, {"Text": "a", "label": "red"}, {"Text": "b", "label": "red"})
    for path in (table, lines):
        error = fault(path)
        assert "'Text', 'label'" in str(error) and error.public == "the data file lacks a column"
    both = fault(lines, data=DataConfig(text_column="T", text_pair_column="other"))
    assert "no column 'T' and 'other'" in str(both) and both.public == "the data file lacks a column"


def test_parquet_without_the_column_or_not_parquet_at_all(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "note": [SECRET]}), path)
    assert "no column 'label'" in str(fault(path))
    path.write_bytes(SECRET.encode() * 9)
    assert fault(path).public == "the data file is not readable Parquet"
    with pytest.raises(DataError, match="there is no data file"):
        read_rows(tmp_path / "none.parquet", COLOURS, DATA)


def test_a_column_twice_or_an_unreadable_header(tmp_path: Path) -> None:
    twice = fault(csv(tmp_path, "text,label,text\na,red,b\n"))
    assert "the column 'text' 2 times" in str(twice) and twice.public == "the data file has a column more than once"
    assert fault(csv(tmp_path, b"t\xe9xt,label\na,red\n")).public == "the data file has no readable header"
    assert fault(csv(tmp_path, '"text,label\na,red\n')).public == "the data file has no readable header"


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_labels_have_to_be_configured(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"set task\.labels, e\.g\. labels = "):
        read_rows(jsonl(tmp_path, {"text": "a", "label": "red"}), TaskConfig(kind=kind), DATA)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DependencyError, match=r"pip install 'fedgiva\[parquet\]'"):
        read_rows(tmp_path / "rows.parquet", COLOURS, DATA)
