"""`giva run`: list and show runs; start, stop and resume them on a SuperLink."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from giva_core.errors import StoreError
from giva_core.report import Report, Table

from .finished import finished_report
from .options import app_option, run_argument, settings_option, store_option, superlink_name_option
from .result import Bytes

if TYPE_CHECKING:
    from giva_core.types import RoundRecord
    from server.deployed import Submitted
    from server.run_store import RunStore, RunSummary


@click.group()
def run() -> None:
    """List and show runs; start, stop and resume them.

    RUN is a run's id, the beginning of one, or `last`.
    """


@run.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Show the newest runs only.")
@store_option
def list_runs(store: RunStore, limit: int) -> Report:
    """List the runs, newest first."""
    runs = store.runs()
    shown = runs[:limit]
    columns = ("run", "name", "status", "method", "rounds", "train loss", "eval loss", "metric", "value", "up", "down")
    rows = []
    for summary in shown:
        name = main_metric(summary)
        rows.append(
            (
                summary.run_id,
                summary.name,
                summary.status,
                summary.settings.get("method"),
                f"{summary.rounds_done}/{summary.settings.get('rounds.num-rounds', '?')}",
                summary.train_loss,
                summary.eval_loss,
                name,
                value_of(summary.metrics, name),
                Bytes(summary.bytes_up),
                Bytes(summary.bytes_down),
            )
        )
    notes = []
    if len(runs) > limit:
        notes.append(f"{len(runs) - limit} older runs are not shown; see --limit.")
    if not runs:
        notes.append(f"There are no runs in {store.root} yet.")
    data = {"store": store.root, "total": len(runs), "runs": [_data(summary) for summary in shown]}
    return Report("run-list", data, (Table("", columns, tuple(rows)),) if rows else (), tuple(notes))


@run.command("show")
@run_argument
@store_option
def show_run(store: RunStore, reference: str) -> Report:
    """Show one run: settings, phases, bytes, facts."""
    from giva_core.config import RunConfig

    summary = store.run(reference)
    records = store.rounds(summary.run_id)
    defaults = RunConfig().to_flat()
    changed = {
        key: {"value": value, "default": defaults.get(key)}
        for key, value in summary.settings.items()
        if defaults.get(key) != value
    }
    phases = _phases(records)
    adapter = store.adapter_folder(summary.run_id)
    digest, notes = None, []
    try:
        digest = summary.config.digest()
    except StoreError as error:
        notes.append(str(error))
    data = {
        **_data(summary),
        "config": summary.settings,
        "changed": changed,
        "config_digest": digest,
        "versions": summary.versions,
        "facts": summary.facts,
        "phases": phases,
        "folder": store.run_folder(summary.run_id),
        "adapter": adapter if adapter.exists() else None,
    }
    about = (
        ("run", summary.run_id),
        ("name", summary.name),
        ("status", summary.status),
        ("reason", summary.reason),
        ("engine", summary.engine),
        ("created", summary.created),
        ("updated", summary.updated),
        ("rounds", f"{summary.rounds_done} of {summary.settings.get('rounds.num-rounds', '?')}"),
        ("train loss", summary.train_loss),
        ("eval loss", summary.eval_loss),
        *summary.metrics.items(),
        ("config digest", digest),
        *summary.facts.items(),
        *((f"{package} version", version) for package, version in summary.versions.items()),
        ("folder", str(data["folder"])),
        ("adapter", str(data["adapter"] or "")),
    )
    settings = tuple((key, item["value"], item["default"]) for key, item in changed.items())
    totals = ("total", len(records), None, Bytes(summary.bytes_up), Bytes(summary.bytes_down), summary.seconds)
    rows = [
        (row["phase"], row["rounds"], row["sites"], Bytes(row["bytes_up"]), Bytes(row["bytes_down"]), row["seconds"])
        for row in phases
    ]
    tables = [Table("Run", ("", ""), tuple((name, value) for name, value in about))]
    if settings:
        tables.append(Table("Settings that differ from the defaults", ("setting", "value", "default"), settings))
    if rows:
        columns = ("phase", "rounds", "sites", "up", "down", "seconds")
        tables.append(Table("Phases", columns, (*rows, totals)))
    return Report("run-show", data, tuple(tables), tuple(notes))


@run.command("start")
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@settings_option
@superlink_name_option
@app_option
@click.option("--stream", is_flag=True, help="Show the run's log, and wait for its end.")
@store_option
def start(
    store: RunStore, config: Path, settings: dict[str, Any], superlink: str | None, app: Path | None, stream: bool
) -> Report:
    """Start a run on a SuperLink."""
    from giva_core.config import RunConfig
    from server import deployed

    return _submitted(deployed.start(RunConfig.from_toml(config, settings), superlink, app), store, stream)


@run.command("stop")
@run_argument
@superlink_name_option
@store_option
def stop(store: RunStore, reference: str, superlink: str | None) -> Report:
    """End a run on its SuperLink; it can be resumed.

    RUN may be Flower's own id of the run as well, as `giva run start` tells it.
    """
    from server import deployed

    stopped = deployed.stop(reference, store, superlink)
    data = {**asdict(stopped), "run_id": stopped.run_id or None}
    notes = [f"Run {stopped.run_id or stopped.flower_run_id} is stopped."]
    if not stopped.was_running:
        notes.append("Its SuperLink had ended it before.")
    if stopped.run_id:
        notes.append(f"next: giva run resume {stopped.run_id}")
    return Report("run-stop", data, notes=tuple(notes))


@run.command("resume")
@run_argument
@superlink_name_option
@app_option
@click.option("--stream", is_flag=True, help="Of a run on a SuperLink, show the log, and wait for its end.")
@store_option
def resume(store: RunStore, reference: str, superlink: str | None, app: Path | None, stream: bool) -> Report:
    """Continue a run after its last recorded round, where it was started."""
    summary = store.run(reference)
    if summary.engine == "flower":
        from server import deployed

        if summary.status == "completed":
            return finished_report(store, summary.run_id)
        return _submitted(deployed.resume(summary, store, superlink, app), store, stream)

    from server import simulate
    from server.progress import describe

    def watch(record: RoundRecord) -> None:
        click.echo(describe(record, summary.config), err=True)

    return finished_report(store, simulate.resume(summary.run_id, store, watch))


def _submitted(submitted: Submitted, store: RunStore, stream: bool) -> Report:
    """What became of a run that was given to a SuperLink; with `stream`, after its end."""
    link, flower_run_id = submitted.link, submitted.flower_run_id
    data: dict[str, Any] = {"flower_run_id": flower_run_id, "superlink": link.connection.name}
    if not stream:
        notes = [
            f"SuperLink {link.connection.name} has taken the run; Flower's id of it is {flower_run_id}.",
            "next: giva run list, where the server's run store lies and the run will be in some seconds; "
            f"giva run stop {flower_run_id} to end it",
        ]
        return Report("run-submitted", data, notes=tuple(notes))
    link.stream_log(flower_run_id)
    status = link.run_status(flower_run_id)
    stored = next((run for run in store.runs() if run.facts.get("flower_run_id") == flower_run_id), None)
    if stored is not None and stored.status == "completed":
        return finished_report(store, stored.run_id)
    notes = [f"The run has ended, {stored.status if stored else status}."]
    if stored is not None and stored.reason:
        notes.append(stored.reason)
    data |= {"status": status, "run_id": stored.run_id if stored else None}
    return Report("run-submitted", data, notes=tuple(notes), exit_code=0 if status == "finished:completed" else 1)


def main_metric(summary: RunSummary) -> str:
    """Name of the metric by which the run's sites are compared."""
    from giva_core.metrics import main_metric

    return main_metric(str(summary.settings.get("task.kind", "classification")))


def value_of(metrics: Any, name: str) -> float | None:
    """The total of a metric, or the mean of the sites' own where the total is not known."""
    return metrics.get(name, metrics.get(f"mean_site_{name}"))


def _data(summary: RunSummary) -> dict[str, Any]:
    return {
        "run_id": summary.run_id,
        "name": summary.name,
        "status": summary.status,
        "reason": summary.reason,
        "engine": summary.engine,
        "method": summary.settings.get("method"),
        "created": summary.created,
        "updated": summary.updated,
        "rounds_done": summary.rounds_done,
        "num_rounds": summary.settings.get("rounds.num-rounds"),
        "train_loss": summary.train_loss,
        "eval_loss": summary.eval_loss,
        "metrics": summary.metrics,
        "bytes_up": summary.bytes_up,
        "bytes_down": summary.bytes_down,
        "seconds": summary.seconds,
    }


def _phases(records: list[RoundRecord]) -> list[dict[str, Any]]:
    phases: dict[str, dict[str, Any]] = {}
    sites: dict[str, set[str]] = {}
    for record in records:
        empty = {"phase": record.phase, "rounds": 0, "sites": 0, "bytes_up": 0, "bytes_down": 0, "seconds": 0.0}
        row = phases.setdefault(record.phase, empty)
        sites.setdefault(record.phase, set()).update(site.site for site in record.sites)
        row["rounds"] += 1
        row["sites"] = len(sites[record.phase])
        for name in ("bytes_up", "bytes_down", "seconds"):
            row[name] += getattr(record, name)
    return list(phases.values())
