"""The reference pages tell what the code does: every setting, every command."""

from __future__ import annotations

from pathlib import Path

import click

from client.site_file import describe
from giva_core.config import describe_options
from server.cli.main import NOUNS, cli

DOCS = Path(__file__).parents[1] / "docs"

#: What the table of a site file's keys begins with; the first of its kind on the page.
SITE_TABLE = "| key | default | meaning |\n|---|---|---|\n"


def commands() -> list[str]:
    context = click.Context(cli)
    found = []
    for noun in NOUNS:
        command = cli.get_command(context, noun)
        verbs = command.commands if isinstance(command, click.Group) else [""]
        found.extend(f"giva {noun} {verb}".strip() for verb in verbs)
    return found


def render_settings() -> str:
    """The tables of docs/configuration.md; `python tests/regenerate.py` puts them there."""
    text, section = "", None
    for key, default, help_text in describe_options():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            title = f"[{section}]" if section else "Top level"
            text += f"{chr(10) if text else ''}## {title}\n\n| key | default | meaning |\n|---|---|---|\n"
        shown = f"`{default}`" if default else ""
        text += f"| `{key}` | {shown} | {help_text.replace('|', chr(92) + '|')} |\n"
    return text


def render_site() -> str:
    """The table of a site file's keys; `python tests/regenerate.py` puts it there."""
    rows = [
        f"| `{key}` | {_cell(default)} | {text.replace('|', chr(92) + '|')} |\n" for key, default, text in describe()
    ]
    return SITE_TABLE + "".join(rows)


def _cell(default: str) -> str:
    return f"`{default}`" if default not in ("", "required") else default


def test_every_key_of_a_site_file_is_documented_as_it_is():
    assert render_site() + "\n## Top level" in (DOCS / "configuration.md").read_text(encoding="utf-8")


def test_every_setting_is_documented_as_it_is():
    assert (DOCS / "configuration.md").read_text(encoding="utf-8").endswith("\n" + render_settings())


def test_every_command_is_documented():
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert len(commands()) > 12
    for command in commands():
        assert f"| `{command} " in text or f"| `{command}`" in text, command
