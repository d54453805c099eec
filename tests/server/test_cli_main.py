"""The command `giva`: instant, documented, one message and one exit code for every error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from giva_core.errors import ConfigError, DataError
from giva_core.report import Report, Table
from server.cli import main
from server.cli.main import NOUNS, cli

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "flwr", "numpy", "transformers", "rich", "matplotlib", "safetensors")
REPORT = Report(
    "made", {"loss": float("nan"), "rows": (1, 2)}, (Table("Made", ("a", "b"), ((1, 0.5),)),), ("A note.",), 3
)


def giva(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from leaves(inner, (*path, name))
    else:
        yield path, command


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """The command `giva probe`, which raises what is put into the list, or answers with `REPORT`."""
    raised: list[BaseException] = []

    @click.command()
    def probe() -> Report:
        """Probe."""
        for error in raised:
            raise error
        return REPORT

    monkeypatch.setitem(main.NOUNS, "probe", ("server.cli.main:probe", "Probe."))
    monkeypatch.setattr(main, "probe", probe, raising=False)
    return raised


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom server.cli.main import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as exit:\n    assert exit.code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stderr.strip() == "[]"
    for noun, (_, text) in NOUNS.items():
        assert noun in done.stdout and text in done.stdout


@pytest.mark.parametrize("noun", NOUNS)
def test_every_command_is_documented(noun: str) -> None:
    module = NOUNS[noun][0].partition(":")[0]
    pytest.importorskip(module)
    context = click.Context(cli)
    command = cli.get_command(context, noun)
    assert command is not None and command.help
    for path, leaf in leaves(command, (noun,)):
        assert leaf.help and leaf.help.strip().split("\n")[0].endswith("."), f"giva {' '.join(path)} has no help"
        for option in leaf.params:
            if isinstance(option, click.Option):
                assert option.help, f"giva {' '.join(path)} {option.opts[0]} has no help"
        assert [option.name for option in leaf.params].count("as_json") == 1
        shown = giva(*path, "--help")
        assert shown.exit_code == 0 and "--json" in shown.stdout


def test_a_command_is_not_changed_by_being_loaded_twice() -> None:
    context = click.Context(cli)
    for _ in range(2):
        command = cli.get_command(context, "run")
        assert isinstance(command, click.Group)
        assert [option.name for option in command.commands["list"].params].count("as_json") == 1


def test_version() -> None:
    import giva_core

    assert giva("--version").stdout.split() == ["giva,", "version", giva_core.__version__]


def test_a_report_sets_text_and_exit_code(failing: list[BaseException]) -> None:
    done = giva("probe")
    assert done.exit_code == 3
    assert done.stdout == "Made\na       b\n1  0.5000\n\nA note.\n"


def test_json_is_one_line_in_the_envelope(failing: list[BaseException]) -> None:
    done = giva("probe", "--json")
    assert done.exit_code == 3 and done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {"schema": 1, "kind": "made", "data": {"loss": None, "rows": [1, 2]}}


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (DataError("no rows", remedy="add some"), 1, "data"),
        (ConfigError("no such setting"), 2, "config"),
        (click.ClickException("odd"), 1, "error"),
        (click.BadParameter("odd"), 2, "usage"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("secret 17"), 1, "internal"),
    ],
)
def test_every_error_has_a_message_and_a_code(
    failing: list[BaseException], error: BaseException, code: int, kind: str
) -> None:
    failing.append(error)
    plain, with_json = giva("probe"), giva("probe", "--json")
    assert plain.exit_code == with_json.exit_code == code
    assert plain.stdout == "" and "Error: " in plain.stderr
    assert "Traceback" not in plain.stderr
    envelope = json.loads(with_json.stdout)
    assert (envelope["schema"], envelope["kind"], envelope["data"]["kind"]) == (1, "error", kind)
    assert envelope["data"]["message"] and set(envelope["data"]) == {"kind", "message"}


def test_a_defect_shows_its_text_only_when_asked(failing: list[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    failing.append(ZeroDivisionError("secret 17"))
    monkeypatch.delenv("GIVA_DEBUG", raising=False)
    quiet = giva("probe")
    assert "secret" not in quiet.stderr and "GIVA_DEBUG=1" in quiet.stderr and quiet.stderr.count("\n") == 1
    monkeypatch.setenv("GIVA_DEBUG", "1")
    assert "secret 17" in giva("probe").stderr


def test_control_characters_in_messages_are_written_out(failing: list[BaseException]) -> None:
    failing.append(DataError("site \x1b[31mred"))
    assert "\\x1b[31mred" in giva("probe").stderr


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["run", "bogus"], ["run", "list", "--limit", "none"], ["round", "show"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    done = giva(*arguments)
    assert done.exit_code == 2 and done.stdout == "" and "Error: " in done.stderr
    envelope = json.loads(giva(*arguments, "--json").stdout)
    assert envelope["data"]["kind"] == "usage"


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from server.cli.main import main; main()"
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-c", command, "run", "list", "--store", str(tmp_path)]
    done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""
