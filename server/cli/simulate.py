"""`giva simulate`: a whole federation in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from giva_core.config import RunConfig, parse_assignments
from giva_core.report import Report
from giva_core.types import RoundRecord


@click.command()
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting, e.g. --set rounds.num-rounds=3."
)
@click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="GIVA_STORE",
    help="Run store; default: $GIVA_HOME/store.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG to draw of the finished run.")
def simulate(config: Path, settings: tuple[str, ...], store: Path | None, plot: Path | None) -> Report:
    """Run a federation in one process: every sub-folder of data.folder is a site."""
    run = RunConfig.from_toml(config, parse_assignments(settings))

    from server.progress import describe
    from server.run_store import RunStore, default_root
    from server.simulate import simulate as start

    from .finished import finished_report

    def watch(record: RoundRecord) -> None:
        click.echo(describe(record, run), err=True)

    runs = RunStore(store or default_root())
    run_id = start(run, runs, watch)
    report = finished_report(runs, run_id)
    if plot is not None:
        from .metrics import write_plot

        write_plot(runs, [runs.run(run_id)], plot)
        report = replace(report, notes=(*report.notes, f"plot: {plot}"))
    return report
