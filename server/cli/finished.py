"""What `giva simulate` and `giva run resume` answer: the rounds of a finished run, and where its adapter lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from giva_core.report import Report, Table

from .result import Bytes

if TYPE_CHECKING:
    from server.run_store import RunStore

_SHOWN = 5


def finished_report(store: RunStore, run_id: str) -> Report:
    """The report of a run that has come to its end; exit code 3 where a site did not count in some phase."""
    from giva_core.metrics import main_metric

    summary = store.run(run_id)
    records = store.rounds(run_id, "train")
    main = main_metric(summary.config.task.kind)
    rows = tuple(
        (
            record.round,
            record.train_loss,
            record.eval_loss,
            record.metrics.get(main, record.metrics.get(f"mean_site_{main}")),
            record.metrics.get(f"worst_{main}"),
            record.aggregation_error,
            Bytes(record.bytes_up),
            Bytes(record.bytes_down),
            record.seconds,
        )
        for record in records
    )
    columns = ("round", "train loss", "eval loss", main, f"worst {main}", "aggregation error", "up", "down", "seconds")
    adapter = store.adapter_folder(run_id)
    troubles = [
        f"{site.site}: {site.status} in {record.phase} {record.round}: {site.reason}"
        for record in store.rounds(run_id)
        for site in record.sites
        if site.status != "ok"
    ]
    data = {
        "run_id": run_id,
        "status": summary.status,
        "adapter": str(adapter),
        "facts": dict(summary.facts),
        "metrics": dict(records[-1].metrics) if records else {},
        "rounds_done": len(records),
        "troubles": troubles,
    }
    notes = (
        *troubles[:_SHOWN],
        *([f"and {len(troubles) - _SHOWN} more; see giva round show"] if len(troubles) > _SHOWN else []),
        f"run {run_id}: {summary.status}",
        f"adapter: {adapter}",
        f"next: giva run show {run_id}, giva metrics plot {run_id}",
    )
    return Report("run-finished", data, (Table("rounds", columns, rows),), notes, exit_code=3 if troubles else 0)
