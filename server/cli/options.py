"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from giva_core.errors import StoreError

if TYPE_CHECKING:
    from server.flower import SuperLink
    from server.run_store import RunStore

_SUPERLINK_HELP = "Which SuperLink, see `giva superlink list`.  [default: the one added last]"

F = TypeVar("F", bound=Callable[..., Any])


def store_option(command: F) -> F:
    """`--store FOLDER`; the command receives `store`, a `RunStore`."""
    return click.option(
        "--store",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="GIVA_STORE",
        show_envvar=True,
        callback=_open_store,
        help="Folder of the run store.  [default: $GIVA_HOME/store or ~/.giva/store]",
    )(command)


def run_argument(command: F) -> F:
    """`[RUN]`; the command receives `reference`, to be resolved by `store.run`."""
    return click.argument("reference", metavar="[RUN]", default="last")(command)


def _open_store(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> RunStore:
    from server.run_store import RunStore, default_root

    return RunStore(value or default_root())


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user asked for, complete or not at all; missing folders are made.

    Raises:
        StoreError: It cannot be written.
    """
    from server.run_store import write_atomically

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise StoreError(f"{path} cannot be written", got=error.strerror, remedy="choose another --output") from error


def settings_option(command: F) -> F:
    """`--set KEY=VALUE`, any number of them; the command receives `settings`, flat settings by key."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_parse_settings,
        help="Override a setting, e.g. --set rounds.num-rounds=3.",
    )(command)


def superlink_option(command: F) -> F:
    """`--superlink CONNECTION`; the command receives `link`, a `SuperLink`."""
    return click.option("--superlink", "link", metavar="CONNECTION", callback=_find_superlink, help=_SUPERLINK_HELP)(
        command
    )


def superlink_name_option(command: F) -> F:
    """`--superlink CONNECTION` where it may turn out not to be needed; the command receives `superlink`, its name."""
    return click.option("--superlink", metavar="CONNECTION", help=_SUPERLINK_HELP)(command)


def app_option(command: F) -> F:
    """`--app FOLDER`; the command receives `app`, to be resolved by `app_folder`."""
    return click.option(
        "--app",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of the Flower app.  [default: $GIVA_APP, the working directory, or where this is installed]",
    )(command)


def _parse_settings(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, Any]:
    from giva_core.config import parse_assignments

    return parse_assignments(value)


def _find_superlink(ctx: click.Context, parameter: click.Parameter, value: str | None) -> SuperLink:
    from server.flower import SuperLink

    return SuperLink.find(value)
