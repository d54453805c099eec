"""What `giva data prepare` leaves on disk, whatever the data are: sites, all rows pooled, and a summary of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from giva_core.errors import ConfigError

from .new_files import new_folder, write_json

SPLITS = ("train", "validation", "test")

_SUMMARY = "federation.json"

Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Prepared:
    """A dataset and its model on disk.

    Attributes:
        folder: Everything of this dataset: `sites/`, `pooled/` and `federation.json`.
        model: The model's folder.
        federation: Content of `federation.json`: labels, counts by site, sources, licences, seed.
        created: False if the folder was there before and nothing was written.
    """

    folder: Path
    model: Path
    federation: Mapping[str, Any]
    created: bool

    @property
    def sites(self) -> Path:
        """The folder with one sub-folder for each site, for `data.folder`."""
        return self.folder / "sites"

    @property
    def pooled(self) -> Path:
        """All sites' examples together, for the comparison with training in one place."""
        return self.folder / "pooled"


def refuse_negative(train_examples: int, seed: int) -> None:
    """Refuse a number of examples or a seed below 0.

    Raises:
        ConfigError: One of them is.
    """
    for name, value in (("train-examples", train_examples), ("seed", seed)):
        if value < 0:
            raise ConfigError(f"{name} is too small", got=value, expected="at least 0")


def prepared_before(folder: Path, model: Path, progress: Callable[[str], None]) -> Prepared | None:
    """The dataset in `folder`, if it is there."""
    summary = folder / _SUMMARY
    if not summary.exists():
        return None
    progress(f"{folder} is there already")
    return Prepared(folder, model, json.loads(summary.read_text(encoding="utf-8")), created=False)


def write_dataset(
    folder: Path,
    model: Path,
    federation: Mapping[str, Any],
    sites: Mapping[str, Mapping[str, Rows]],
    pooled: Mapping[str, Rows],
    write: Callable[[Path, Rows], None],
    progress: Callable[[str], None],
) -> Prepared:
    """Write a dataset in place of what `folder` holds.

    Args:
        folder: Where to.
        model: The model's folder.
        federation: Content of `federation.json`.
        sites: Rows by site and split.
        pooled: Rows of all sites by split.
        write: Writes the rows of one split; takes its path, without an ending.
        progress: Takes a sentence on what is being done.
    """
    progress(f"writing {folder}")
    with new_folder(folder) as new:
        for place, splits in {"pooled": pooled, **{f"sites/{site}": splits for site, splits in sites.items()}}.items():
            for name, rows in splits.items():
                write(new / place / name, rows)
        write_json(new / _SUMMARY, federation)
    return Prepared(folder, model, federation, created=True)
