"""The in-process engine: a whole federation in one process, on Flower's interfaces, with real messages.

The ClientApp is named by reference, as Flower names it, since the server knows nothing of the client's code.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from giva_core.config import RunConfig
from giva_core.errors import ConfigError, StoreError
from giva_core.sites import site_folders
from giva_core.types import RoundRecord

from .app import server_versions
from .local_grid import App, LocalGrid
from .rounds import Federation
from .run_store import RunStore
from .strategy import make_aggregator

CLIENT_APP = "client.app:app"
ENGINE = "simulate"

_FIRST_NODE_ID = 1001

Watch = Callable[[RoundRecord], None]


def load_app(reference: str = CLIENT_APP) -> App:
    """The ClientApp at `module:attribute`."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def simulated_nodes(config: RunConfig) -> dict[int, Mapping[str, Any]]:
    """Node configuration by node id, one node for each sub-folder of `data.folder`, as Flower's simulation gives it.

    Raises:
        DataError: There is no such folder, or nothing in it.
    """
    count = len(site_folders(config.data))
    return {_FIRST_NODE_ID + index: {"partition-id": index, "num-partitions": count} for index in range(count)}


def simulate(config: RunConfig, store: RunStore, watch: Watch = lambda record: None) -> str:
    """Run a federation from its start; returns the run's id."""
    make_aggregator(config)  # a strategy that is refused must not leave a run behind
    _check_sites(config)
    grid = _grid(config)
    run_id = store.create_run(config, ENGINE, server_versions())
    Federation(grid, config, store, run_id, watch).run()
    return run_id


def resume(run_id: str, store: RunStore, watch: Watch = lambda record: None) -> str:
    """Continue a stored run from its last state; returns its full id.

    Raises:
        StoreError: The run belongs to another engine.
    """
    run = store.run(run_id)
    if run.engine != ENGINE:
        raise StoreError(
            f"run {run.run_id} was not started by `giva simulate`",
            got=f"engine {run.engine}",
            remedy=f"continue it with `giva run resume {run.run_id}`",
        )
    if run.status != "completed":
        Federation(_grid(run.config), run.config, store, run.run_id, watch).run()
    return run.run_id


def _check_sites(config: RunConfig) -> None:
    """Refuse to wait for sites that no folder stands for."""
    count, rounds = len(simulated_nodes(config)), config.rounds
    if count < max(rounds.min_sites, rounds.quorum):
        raise ConfigError(
            "there are fewer sites than the run asks for",
            got=f"{count} folders in data.folder",
            expected=f"at least rounds.min-sites = {rounds.min_sites} and rounds.quorum = {rounds.quorum}",
            remedy=f"set rounds.min-sites to {count} or less, or add folders",
        )


def _grid(config: RunConfig) -> LocalGrid:
    # sites take folders that the run names only on a machine that says it simulates; server and sites are one here
    os.environ.setdefault("GIVA_SIMULATION", "1")
    return LocalGrid(load_app(), simulated_nodes(config), config.to_flat())
