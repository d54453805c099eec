"""The Flower ServerApp: composition only. Configuration and store in, a federation that runs to its end out."""

from __future__ import annotations

import logging
import platform
from importlib.metadata import version

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import giva_core
from giva_core.config import RunConfig
from giva_core.errors import ConfigError
from giva_core.types import RoundRecord

from .progress import describe
from .rounds import Federation
from .run_store import RunStore, default_root
from .strategy import make_aggregator

log = logging.getLogger("giva.server")
app = ServerApp()


def server_versions() -> dict[str, str]:
    """The versions that a run is stored with."""
    found = {name: version(name) for name in ("flwr", "numpy")}
    return {"fedgiva": giva_core.__version__, "python": platform.python_version(), **found}


def continued_config(given: RunConfig, stored: RunConfig) -> RunConfig:
    """The stored run's configuration, checked against the one that Flower has given to the sites.

    Raises:
        ConfigError: They differ, so that every site would refuse the run.
    """
    if given.digest() != stored.digest():
        raise ConfigError(
            "the sites were given another configuration than the stored run's",
            got=f"{given.digest()[:12]}…",
            expected=f"{stored.digest()[:12]}…",
            cause="`flwr run` fills in the app's defaults where it is given `resume` alone",
            # Flower takes a file or key-value pairs, not both
            remedy=f"use `giva run resume {given.resume}`, which sends all of it; or add the line "
            f'resume = "{given.resume}" to the top of the file that started it, and use that again',
        )
    return stored


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start a run, or continue the one that `resume` names."""
    config = RunConfig.from_flat(context.run_config)
    store = RunStore(default_root())
    if config.resume:
        run_id = store.run(config.resume).run_id
        config = continued_config(config, store.run(run_id).config)
    else:
        make_aggregator(config)  # a strategy that is refused must not leave a run behind
        run_id = store.create_run(config, "flower", server_versions())

    def tell(record: RoundRecord) -> None:
        log.info("%s", describe(record, config))

    if not log.handlers:  # Flower sets up its own logger only; the root logger would print every library's chatter
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    store.set_facts(run_id, {"flower_run_id": str(context.run_id)})  # what `giva run stop` has to end
    log.info("run %s", run_id)
    Federation(grid, config, store, run_id, tell).run()
