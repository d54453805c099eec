"""A filled store, and the command line that reads it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from filled_store import fill

from server.cli.main import cli
from server.run_store import RunStore


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, str, str]:
    """A store and its two runs; see `fill`."""
    return fill(tmp_path_factory.mktemp("store"))


@pytest.fixture
def giva(filled: tuple[RunStore, str, str]) -> Callable[..., Result]:
    """The command line on that store."""
    environment = {"GIVA_STORE": str(filled[0].root)}
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments], env=environment)
