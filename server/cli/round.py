"""`giva round`: look into the rounds of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from giva_core.errors import StoreError
from giva_core.report import Report, Table

from .options import run_argument, store_option
from .result import Bytes
from .run import main_metric, value_of

if TYPE_CHECKING:
    from giva_core.types import RoundRecord
    from server.run_store import RunStore


@click.group("round")
def round_() -> None:
    """Look into the rounds of a run.

    RUN is a run's id, the beginning of one, or `last`.
    """


@round_.command("list")
@run_argument
@store_option
def list_rounds(store: RunStore, reference: str) -> Report:
    """List the phases and rounds of a run."""
    summary = store.run(reference)
    metric = main_metric(summary)
    records = store.rounds(summary.run_id)
    columns = (
        *("phase", "round", "sites ok", "examples", "train loss", "eval loss", metric, "worst site"),
        *("aggregation error", "up", "down", "seconds"),
    )
    rows = tuple(
        (
            record.phase,
            record.round,
            f"{_sites_ok(record)}/{len(record.sites)}",
            record.total_examples,
            record.train_loss,
            record.eval_loss,
            value_of(record.metrics, metric),
            record.metrics.get(f"worst_{metric}"),
            record.aggregation_error,
            Bytes(record.bytes_up),
            Bytes(record.bytes_down),
            record.seconds,
        )
        for record in records
    )
    notes = () if rows else (f"Run {summary.run_id} has recorded nothing yet.",)
    data = {"run_id": summary.run_id, "metric": metric, "rounds": [_data(record) for record in records]}
    return Report("round-list", data, (Table(f"Run {summary.run_id}", columns, rows),) if rows else (), notes)


@round_.command("show")
@click.argument("reference", metavar="RUN")
@click.argument("number", metavar="ROUND", type=click.IntRange(min=1))
@click.option("--phase", default="train", show_default=True, help="hello, head, calibrate, bases or train.")
@store_option
def show_round(store: RunStore, reference: str, number: int, phase: str) -> Report:
    """Show one round, site by site."""
    summary = store.run(reference)
    records = store.rounds(summary.run_id)
    found = [record for record in records if (record.phase, record.round) == (phase, number)]
    if not found:
        raise StoreError(
            f"run {summary.run_id} has no {phase} round {number}",
            expected=", ".join(f"{record.phase} {record.round}" for record in records) or "none has been recorded yet",
            remedy="see `giva round list`, or name another --phase",
        )
    record = found[0]
    names = sorted({name for site in record.sites for name in site.metrics})
    columns = (
        "site",
        "status",
        "examples",
        "steps",
        "train loss",
        "eval loss",
        *names,
        "up",
        "down",
        "seconds",
        "reason",
    )
    rows = tuple(
        (
            site.site,
            site.status,
            site.num_examples,
            site.num_steps,
            site.train_loss,
            site.eval_loss,
            *(site.metrics.get(name) for name in names),
            Bytes(site.bytes_up),
            Bytes(site.bytes_down),
            site.train_seconds,
            site.reason,
        )
        for site in record.sites
    )
    totals = (
        ("examples", record.total_examples),
        ("train loss", record.train_loss),
        ("eval loss", record.eval_loss),
        *record.metrics.items(),
        ("aggregation error", record.aggregation_error),
        ("up", Bytes(record.bytes_up)),
        ("down", Bytes(record.bytes_down)),
        ("seconds", record.seconds),
    )
    data = {"run_id": summary.run_id, **_data(record), "sites": [asdict(site) for site in record.sites]}
    tables = (
        Table(f"Run {summary.run_id}, {phase} round {number}, by site", columns, rows),
        Table("Total", ("", ""), totals),
    )
    return Report("round-show", data, tables)


def _sites_ok(record: RoundRecord) -> int:
    return sum(site.status == "ok" for site in record.sites)


def _data(record: RoundRecord) -> dict[str, Any]:
    fields = asdict(record)
    del fields["sites"]
    return {**fields, "sites_ok": _sites_ok(record), "sites_sampled": len(record.sites)}
