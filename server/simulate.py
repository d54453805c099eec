"""The in-process engine: a whole federation in one process, on Flower's interfaces, with real messages.

The ClientApp is named by reference, as Flower names it, since the server knows nothing of the client's code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from giva_core.config import RunConfig
from giva_core.errors import DataError, StoreError
from giva_core.paths import expand
from giva_core.types import RoundRecord

from .app import server_versions
from .local_grid import App, LocalGrid
from .rounds import Federation
from .run_store import RunStore

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
    root = expand(config.data.folder)
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()] if config.data.folder and root.is_dir() else []
    if not folders:
        raise DataError(
            "there are no sites to simulate",
            got=f"data.folder = '{config.data.folder}'",
            expected="a folder with one sub-folder for each site",
            cause="the data is not prepared yet, or lies elsewhere",
            remedy="run `giva data prepare`, or correct data.folder",
        )
    count = len(folders)
    return {_FIRST_NODE_ID + index: {"partition-id": index, "num-partitions": count} for index in range(count)}


def simulate(config: RunConfig, store: RunStore, watch: Watch = lambda record: None) -> str:
    """Run a federation from its start; returns the run's id."""
    nodes = simulated_nodes(config)
    run_id = store.create_run(config, ENGINE, server_versions())
    _run(config, store, run_id, nodes, watch)
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
            remedy=f"continue it where it ran: flwr run . -c 'resume=\"{run.run_id}\"'",
        )
    if run.status != "completed":
        _run(run.config, store, run.run_id, simulated_nodes(run.config), watch)
    return run.run_id


def _run(config: RunConfig, store: RunStore, run_id: str, nodes: Mapping[int, Mapping[str, Any]], watch: Watch) -> None:
    grid = LocalGrid(load_app(), nodes, config.to_flat())
    Federation(grid, config, store, run_id, watch).run()
