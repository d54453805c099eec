"""Runs on a SuperLink, from the operator's side: start, stop, resume.

The run itself is `server/app.py`, in a process that the SuperLink's executor starts. The store's run and Flower's are
two: Flower's ends with its process, or with the SuperLink; the store's is then continued by a new one of Flower's. The
store knows the newest as the fact `flower_run_id`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from giva_core.config import RunConfig
from giva_core.errors import ConfigError, StoreError

from .flower import SuperLink, app_folder
from .run_store import RunStore, RunSummary

ENGINE = "flower"
FLOWER_RUN = "flower_run_id"
#: How long a ServerApp takes at most to notice that its run has been stopped.
_LEAVE_SECONDS = 60.0
_FLOWER_ID_DIGITS = 15  # Flower's ids are 64-bit numbers; the store's begin with a date of 8 digits


@dataclass(frozen=True)
class Submitted:
    """A run that a SuperLink has taken."""

    link: SuperLink
    flower_run_id: str


@dataclass(frozen=True)
class Stopped:
    """A run that was ended.

    Attributes:
        flower_run_id: Flower's id.
        run_id: The store's; empty where this store does not know it.
        was_running: Whether the SuperLink still ran it.
    """

    flower_run_id: str
    run_id: str
    was_running: bool


def start(config: RunConfig, superlink: str | None, app: Path | None) -> Submitted:
    """Start a new run.

    Raises:
        ConfigError: There is no such connection or app, or the configuration continues a run.
        SuperLinkError: The SuperLink cannot be reached, or refuses the run.
    """
    if config.resume:
        raise ConfigError(
            "the configuration continues a run", got=f"resume = {config.resume}", remedy="use `giva run resume`"
        )
    folder, link = app_folder(app), SuperLink.find(superlink)
    return Submitted(link, link.start_run(folder, config))


def resume(run: RunSummary, store: RunStore, superlink: str | None, app: Path | None) -> Submitted:
    """Continue a stored run under a new id of Flower's, with the configuration it began with.

    Raises:
        StoreError: A process still advances the run.
    """
    folder, link = app_folder(app), SuperLink.find(superlink)
    with store.locked(run.run_id):  # else two processes would ask the same sites
        if before := str(run.facts.get(FLOWER_RUN, "")):
            link.stop_run(before)  # Flower takes a minute to see that a process was killed; sites must not wait for it
    submitted = Submitted(link, link.start_run(folder, run.config.replace(resume=run.run_id)))
    store.set_facts(run.run_id, {FLOWER_RUN: submitted.flower_run_id})
    return submitted


def stop(reference: str, store: RunStore, superlink: str | None) -> Stopped:
    """End a run, by the store's reference or Flower's id, and mark it as stopped once its process has let go of it.

    Raises:
        StoreError: There is no such run, it is not on a SuperLink, it has ended, or its process does not let go of it.
    """
    link = SuperLink.find(superlink)
    stored = next((run for run in store.runs() if run.facts.get(FLOWER_RUN) == reference), None)
    if stored is None and reference.isdigit() and len(reference) >= _FLOWER_ID_DIGITS:
        return Stopped(reference, "", link.stop_run(reference))
    run = stored or store.run(reference)
    if run.engine != ENGINE or FLOWER_RUN not in run.facts:
        raise StoreError(
            f"run {run.run_id} is not on a SuperLink", got=f"engine {run.engine}", remedy="end its process with Ctrl-C"
        )
    if run.status in ("completed", "stopped"):
        raise StoreError(f"run {run.run_id} has ended", got=f"status {run.status}")
    flower_run_id = str(run.facts[FLOWER_RUN])
    was_running = link.stop_run(flower_run_id)
    _wait_until_left(store, run.run_id)
    store.set_status(run.run_id, "stopped", "stopped by the operator")
    return Stopped(flower_run_id, run.run_id, was_running)


def _wait_until_left(store: RunStore, run_id: str) -> None:
    ends = time.monotonic() + _LEAVE_SECONDS
    while True:
        try:
            with store.locked(run_id):
                return
        except StoreError:
            if time.monotonic() >= ends:
                raise
            time.sleep(0.2)
