"""`giva train`: one machine, no federation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from giva_core.config import RunConfig, parse_assignments
from giva_core.errors import ConfigError
from giva_core.paths import expand
from giva_core.report import Report, Table


@click.command()
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--data",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with the rows; default: data.folder.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("adapter"),
    show_default=True,
    help="Folder of the adapter.",
)
@click.option("--force", is_flag=True, help="Write over an adapter that lies there.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting, e.g. --set giva.rank=16."
)
def train(config: Path, folder: Path | None, output: Path, force: bool, settings: tuple[str, ...]) -> Report:
    """Train an adapter on this machine's data alone."""
    from client.needs import require_training

    require_training()
    from client.alone import LocalRound, site_at, train_alone

    run = RunConfig.from_toml(config, parse_assignments(settings))
    if not force:
        _check_free(output)
    site = site_at(_data_folder(folder, run), run)

    def watch(done: LocalRound) -> None:
        score = "" if done.evaluation is None else f", eval loss {done.evaluation.loss:.4f}"
        click.echo(
            f"{done.phase} round {done.round}: train loss {done.train_loss:.4f}{score}, {done.seconds:.1f} s", err=True
        )

    result = train_alone(run, site, output, watch)
    rows = [_row(done) for done in result.rounds]
    names = sorted({name for row in rows for name in row["metrics"]})
    table = Table(
        "rounds",
        ("phase", "round", "train loss", "eval loss", *names, "seconds"),
        tuple(
            (
                row["phase"],
                row["round"],
                row["train_loss"],
                row["eval_loss"],
                *(row["metrics"].get(n) for n in names),
                row["seconds"],
            )
            for row in rows
        ),
    )
    data = {
        "adapter": str(output),
        "bases_digest": result.bases_digest,
        "arrays_digest": result.arrays_digest,
        "rounds": rows,
    }
    return Report("train", data, (table,), (f"adapter: {output}", f"arrays digest: {result.arrays_digest}"))


def _row(done: Any) -> dict[str, Any]:
    evaluation = done.evaluation
    return {
        "phase": done.phase,
        "round": done.round,
        "train_loss": done.train_loss,
        "eval_loss": evaluation.loss if evaluation else None,
        "metrics": dict(evaluation.metrics) if evaluation else {},
        "seconds": done.seconds,
    }


def _check_free(output: Path) -> None:
    """Refuse before the training, not after it, to write over what lies there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{output} is there already",
            expected="a new or an empty folder",
            cause="an adapter of an earlier training lies there",
            remedy="name another folder with --output, or write over it with --force",
        )


def _data_folder(folder: Path | None, config: RunConfig) -> Path:
    found = folder or (expand(config.data.folder) if config.data.folder else None)
    if found is None or not (found / config.data.train_file).exists():
        sites = sorted(found.glob(f"*/{config.data.train_file}")) if found else []
        raise ConfigError(
            "there are no training rows",
            got=str(found) if found else None,
            expected=f"a folder with {config.data.train_file}",
            cause="this folder has a sub-folder for each site" if sites else "the rows are in a file of another name",
            remedy=f"name one site's folder, as --data {sites[0].parent}"
            if sites
            else "name the folder with --data, and the file in it with --set data.train-file=NAME",
        )
    return found
