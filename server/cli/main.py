"""The command `giva`: finds the noun's module when it is needed, and gives every command `--json` and the exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 partly done; 130 when interrupted.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import giva_core
from giva_core.errors import GivaError

from . import result

#: Noun -> (`module:attribute` of its command, help). Text, so that `giva --help` imports none of them. Where server and
#: sites both have commands of a noun, there are two, with a space between them: neither side imports the other.
NOUNS = {
    "simulate": ("server.cli.simulate:simulate", "Run a whole federation on this machine."),
    "train": ("client.cli.train:train", "Train an adapter on one site's data, without a federation."),
    "data": ("client.cli.data:data", "Fetch and split data."),
    "site": ("server.cli.site:site client.cli.site:site", "Run a site; approve, list and revoke sites."),
    "superlink": ("server.cli.superlink:superlink", "Add, list and check connections to SuperLinks."),
    "run": ("server.cli.run:run", "Start, stop, resume, list and show runs."),
    "round": ("server.cli.round:round_", "Look into the rounds of a run."),
    "metrics": ("server.cli.metrics:metrics", "Show, export and plot the metrics of runs."),
    "bases": ("server.cli.bases:bases", "Prove that this machine builds the same bases; show bases."),
    "adapter": ("server.cli.adapter:adapter", "Show, verify, export and merge finished adapters."),
}


class LazyGroup(click.Group):
    """The root of the command line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The nouns."""
        return list(NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one noun's command."""
        if cmd_name not in NOUNS:
            return None
        return _rendered(_joined([_imported(reference) for reference in NOUNS[cmd_name][0].split()]))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `giva --help`, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(noun, text) for noun, (_, text) in NOUNS.items()])

    def main(  # type: ignore[override]  # click's overloads tell apart what is always the same here
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Run a command line and leave with its exit code; every error becomes one message."""
        args = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        fail = functools.partial(_fail, as_json="--json" in args)
        try:
            sys.exit(super().main(args, prog_name or "giva", **extra) or 0)
        except GivaError as error:
            fail(error.kind, str(error), error.exit_code)
        except click.ClickException as error:
            if isinstance(error, click.UsageError):
                error.show()
                fail("usage", error.format_message(), error.exit_code, told=True)
            fail("error", error.format_message(), error.exit_code)
        except click.Abort:
            fail("interrupted", "interrupted", 130)
        except Exception as error:
            if os.environ.get("GIVA_DEBUG") == "1":
                traceback.print_exc()
            # the exception's own text may hold data: only its type is shown unasked
            hint = "set GIVA_DEBUG=1 to see where it came from, and report it"
            fail("internal", f"unexpected {type(error).__name__}; this is a defect of the program: {hint}", 1)


def _imported(reference: str) -> click.Command:
    module, _, attribute = reference.partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def _joined(halves: list[click.Command]) -> click.Command:
    """One command of one; one group, named and described by the first, of several."""
    first, *others = halves
    if not others:
        return first
    group = copy.copy(first)
    if not isinstance(group, click.Group) or not all(isinstance(other, click.Group) for other in others):
        raise TypeError(f"only groups can be joined: {first.name}")
    for other in others:
        group.commands = {**group.commands, **other.commands}  # type: ignore[attr-defined]
    return group


def _rendered(command: click.Command) -> click.Command:
    """A copy whose leaves take `--json`, show their report and return its exit code."""
    command = copy.copy(command)
    if isinstance(command, click.Group):
        command.commands = {name: _rendered(inner) for name, inner in command.commands.items()}
        return command
    answer = command.callback
    if answer is None:
        raise TypeError(f"the command {command.name} does nothing")

    @functools.wraps(answer)
    def show(*args: Any, as_json: bool, **kwargs: Any) -> int:
        report = answer(*args, **kwargs)
        result.show(report, as_json)
        return report.exit_code

    command.callback = show
    command.params = [
        *command.params,
        click.Option(["--json", "as_json"], is_flag=True, help="Answer with one line of JSON."),
    ]
    return command


def _fail(kind: str, message: str, exit_code: int, *, as_json: bool, told: bool = False) -> None:
    if not told:
        click.echo(f"Error: {result.printable(message)}", err=True)
    if as_json:
        click.echo(result.error_line(kind, message))
    sys.exit(exit_code)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(giva_core.__version__, prog_name="giva")
def cli() -> None:
    """GiVA: train and federate vector adapters whose bases come from gradients.

    The answer goes to stdout, progress to stderr. Every command takes --json.
    """


def main() -> None:
    """Entry point of the command `giva`."""
    cli.main()
