"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from giva_core.errors import StoreError

if TYPE_CHECKING:
    from server.run_store import RunStore

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
