"""Every benchmark that `make benchmark` lists answers `--help` with what its docstring says."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_answers_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    usage, description, *_ = capsys.readouterr().out.split("\n\n")
    assert not ended.value.code and usage.startswith(f"usage: {script.name} ")
    assert docstring and description.splitlines()[0] == docstring.splitlines()[0]
