"""A filled store, the command line that reads it, and a new run in an empty one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from filled_store import VERSIONS, fill

from giva_core.config import RunConfig
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


@pytest.fixture
def run_id(store: RunStore) -> str:
    """A run of which nothing is recorded yet."""
    return store.create_run(RunConfig(), "simulation", VERSIONS)
