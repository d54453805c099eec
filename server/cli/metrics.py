"""`giva metrics`: show, export and plot the metrics of runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from giva_core.report import Report, Table

from .options import run_argument, store_option, write_output
from .result import plain
from .run import main_metric

if TYPE_CHECKING:
    from giva_core.types import RoundRecord
    from server.run_store import RunStore, RunSummary

#: Columns of the long form; `site` is empty for the totals over all sites.
COLUMNS = ("run", "phase", "round", "site", "metric", "value")

_TOTALS = ("total_examples", "train_loss", "eval_loss", "aggregation_error", "bytes_up", "bytes_down", "seconds")
_OF_SITE = (
    "num_examples",
    "num_steps",
    "train_loss",
    "train_seconds",
    "eval_examples",
    "eval_loss",
    "bytes_up",
    "bytes_down",
)


@click.group()
def metrics() -> None:
    """Show, export and plot the metrics of runs.

    RUN is a run's id, the beginning of one, or `last`.
    """


@metrics.command("show")
@run_argument
@store_option
def show_metrics(store: RunStore, reference: str) -> Report:
    """Show losses and metrics by round and by site."""
    summary = store.run(reference)
    records = [record for record in store.rounds(summary.run_id) if record.phase in ("head", "train")]
    names = _names(record.metrics for record in records)
    rows = tuple(
        (record.phase, record.round, record.train_loss, record.eval_loss, *(record.metrics.get(name) for name in names))
        for record in records
    )
    tables, notes = [], []
    if rows:
        tables.append(Table(f"Run {summary.run_id}", ("phase", "round", "train loss", "eval loss", *names), rows))
    else:
        notes.append(f"Run {summary.run_id} has trained nothing yet.")
    evaluated = [record for record in records if any(site.eval_examples for site in record.sites)]
    sites = [site for site in evaluated[-1].sites if site.eval_examples] if evaluated else []
    if evaluated:
        own = _names(site.metrics for site in sites)
        by_site = tuple(
            (site.site, site.eval_examples, site.eval_loss, *(site.metrics.get(name) for name in own)) for site in sites
        )
        title = f"By site, {evaluated[-1].phase} round {evaluated[-1].round}"
        tables.append(Table(title, ("site", "examples", "eval loss", *own), by_site))
    data = {
        "run_id": summary.run_id,
        "metric": main_metric(summary),
        "rounds": [
            {name: getattr(record, name) for name in ("phase", "round", "train_loss", "eval_loss", "metrics")}
            for record in records
        ],
        "sites": [
            {name: getattr(site, name) for name in ("site", "eval_examples", "eval_loss", "metrics")} for site in sites
        ],
    }
    return Report("metrics-show", data, tuple(tables), tuple(notes))


@metrics.command("export")
@run_argument
@click.option(
    "--format", "form", type=click.Choice(["csv", "json"]), default="csv", show_default=True, help="File form."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.  [default: stdout]")
@store_option
def export_metrics(store: RunStore, reference: str, form: str, output: Path | None) -> Report:
    """Export everything measured, one value a row.

    Columns: run, phase, round, site (empty for totals over all sites), metric, value.
    """
    summary = store.run(reference)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in _long(summary.run_id, store.rounds(summary.run_id))]
    text = _csv(rows) if form == "csv" else json.dumps(plain(rows), ensure_ascii=False, indent=1)
    note = text.rstrip("\n")
    if output is not None:
        write_output(output, (text.rstrip("\n") + "\n").encode())
        note = f"Wrote {len(rows)} values of run {summary.run_id} to {output}."
    data = {"run_id": summary.run_id, "format": form, "output": output, "rows": rows}
    return Report("metrics-export", data, notes=(note,))


@metrics.command("plot")
@click.argument("references", metavar="[RUN]...", nargs=-1)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    help="A .png file, or a folder for one.",
)
@store_option
def plot_metrics(store: RunStore, references: tuple[str, ...], output: Path) -> Report:
    """Draw loss, metric and bytes by round, or compare runs."""
    runs = list({run.run_id: run for run in map(store.run, references or ("last",))}.values())
    if output.suffix != ".png":
        output = output / (f"{runs[0].run_id}.png" if len(runs) == 1 else "comparison.png")
    write_plot(store, runs, output)
    data = {"runs": [run.run_id for run in runs], "metric": main_metric(runs[0]), "output": output}
    return Report("metrics-plot", data, notes=(f"Wrote {output}.",))


def write_plot(store: RunStore, runs: Sequence[RunSummary], output: Path) -> None:
    """Draw the runs into a PNG."""
    from .plots import draw

    write_output(output, draw([(run, store.rounds(run.run_id)) for run in runs], main_metric(runs[0])))


def _names(found: Any) -> list[str]:
    """Keys of all mappings, each once, in the order of their first appearance."""
    return list(dict.fromkeys(name for mapping in found for name in mapping))


def _long(run_id: str, records: list[RoundRecord]) -> Iterator[tuple[Any, ...]]:
    for record in records:
        key = (run_id, record.phase, record.round)
        for name, value in _values(record, _TOTALS):
            yield *key, "", name, value
        for site in record.sites:
            for name, value in _values(site, _OF_SITE):
                yield *key, site.site, name, value


def _values(record: Any, fields: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for name in fields:
        if (value := getattr(record, name)) is not None:
            yield name, value
    yield from record.metrics.items()


def _csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
