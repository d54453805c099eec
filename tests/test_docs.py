"""The reference pages tell what the code does: every setting, every command."""

from __future__ import annotations

from pathlib import Path

import click

from giva_core.config import describe_options
from server.cli.main import NOUNS, cli

DOCS = Path(__file__).parents[1] / "docs"


def commands() -> list[str]:
    context = click.Context(cli)
    found = []
    for noun in NOUNS:
        command = cli.get_command(context, noun)
        verbs = command.commands if isinstance(command, click.Group) else [""]
        found.extend(f"giva {noun} {verb}".strip() for verb in verbs)
    return found


def test_every_setting_is_documented_as_it_is():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    wanted = []
    for key, default, help_text in describe_options():
        shown = f"`{default}`" if default else ""
        wanted.append(f"| `{key}` | {shown} | {help_text.replace('|', chr(92) + '|')} |")
    assert rows == wanted


def test_every_command_is_documented():
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert len(commands()) > 12
    for command in commands():
        assert f"| `{command} " in text or f"| `{command}`" in text, command
