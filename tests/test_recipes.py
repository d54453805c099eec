"""Every recipe parses, and finds the data that `giva data prepare` makes unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.prepare import DATASETS, planned_folder
from giva_core.config import RunConfig
from giva_core.paths import giva_home

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_what_data_prepare_makes(path: Path) -> None:
    config = RunConfig.from_toml(path)
    assert path.stem in DATASETS
    assert Path(config.data.folder) == planned_folder(path.stem, giva_home()) / "sites"
    assert Path(config.model.path) == giva_home() / "models" / "all-MiniLM-L6-v2"
    assert len(config.task.labels) >= 2


def test_there_is_a_recipe_for_every_dataset() -> None:
    assert {path.stem for path in RECIPES} == set(DATASETS)
