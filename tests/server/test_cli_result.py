"""Rendering: nothing is cut, nothing commands the terminal, numbers are readable."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from giva_core.report import Report, Table
from server.cli import result
from server.cli.result import Bytes, bytes_text, cell_text, number_text, plain, printable

LONG = "20261122-101530-3f2a" * 12
TABLE = Table(
    "Runs [bold]all[/bold]",
    ("run name", "train loss", "up", "why"),
    ((LONG, 0.25, Bytes(2048), "because [red]x[/red] \x1b[2J"), ("b", None, Bytes(0), "")),
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.000 KiB"),
        (1536, "1.500 KiB"),
        (334_080, "326.2 KiB"),
        (5 * 1024**2, "5.000 MiB"),
        (1024**3, "1.000 GiB"),
        (3 * 1024**5, "3072 TiB"),
    ],
)
def test_bytes_are_binary_units(count: int, text: str) -> None:
    assert bytes_text(count) == cell_text(Bytes(count)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8125, "0.8125"),
        (1.5, "1.500"),
        (-0.00123456, "-0.001235"),
        (2.5e-6, "2.500e-06"),
        (123.4, "123.4"),
        (1234.0, "1234"),
        (12345.6, "12346"),
        (3e7, "3.000e+07"),
        (0.0, "0"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), ("", "-"), (True, "yes"), (False, "no"), (0, "0"), ("a", "a")]
)
def test_cells(value: object, text: str) -> None:
    assert cell_text(value) == text


def test_plain_leaves_only_json() -> None:
    data = {"a": np.float32(0.5), "b": np.array([1, 2]), "c": (math.nan, -math.inf), "d": Path("x"), 1: Bytes(3)}
    assert plain(data) == {"a": 0.5, "b": [1, 2], "c": [None, None], "d": "x", "1": 3}
    assert json.loads(json.dumps(plain(data), allow_nan=False)) == plain(data)


def test_printable_writes_control_characters_out() -> None:
    assert printable("a\x1b[31m\nb\u202eü") == "a\\x1b[31m\\x0ab\\x202eü"
    assert printable("a\n\tb", keep="\n\t") == "a\n\tb"


def test_a_pipe_gets_plain_and_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    result.show(Report("k", {}, (TABLE,), ("A note that is longer than the forty columns of the terminal.",)), False)
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "Runs [bold]all[/bold]"
    assert lines[2].split("  ")[0] == LONG
    assert "because [red]x[/red] \\x1b[2J" in lines[2]
    assert lines[3].split() == ["b", "-", "0", "B", "-"]
    assert lines[5:] == ["A note that is longer than the forty columns of the terminal.", ""]
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)


def test_a_narrow_terminal_gets_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    result.show(Report("k", {}, (TABLE,)), False)
    shown = capsys.readouterr().out
    assert LONG in shown and "2.000 KiB" in shown
    assert "train loss" not in shown and "train" in shown


def test_a_report_without_tables_is_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    result.show(Report("k", {}, notes=("one", "two")), False)
    result.show(Report("k", {}), False)
    assert capsys.readouterr().out == "one\ntwo\n"
