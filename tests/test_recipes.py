"""Every recipe parses and trains: those of the demo on what `giva data prepare` makes, the paper's on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from answering_models import write_decoder, write_rows
from image_models import write_pictures, write_vision

from client import prepare_answers, prepare_vision
from client.alone import site_at, train_alone
from client.prepare import DATASETS, planned_folder
from giva_core.config import RunConfig
from giva_core.paths import giva_home

RECIPES = {path.stem: path for path in (Path(__file__).parents[1] / "recipes").glob("*.toml")}

#: Demo recipes: the folder of their data, and of their model.
DEMOS = {
    **{name: (planned_folder(name, giva_home()), "all-MiniLM-L6-v2") for name in DATASETS},
    "answers": (prepare_answers.planned_folder(giva_home()), "SmolLM2-135M-Instruct"),
    "vision": (prepare_vision.planned_folder(giva_home()), "small-vit"),
}

#: What the paper says: rank, weight decay, warm-up, epochs, tokens, examples of a step, schedule.
PAPER: dict[str, tuple[Any, ...]] = {
    "glue": (8, 0.01, 0.06, 10, 128, 64, "linear"),
    "commonsense": (64, 0.0, 0.003, 3, 512, 16, "linear"),
    "math": (64, 0.0, 0.03, 1, 1024, 32, "cosine"),
    "code": (64, 0.0, 0.03, 1, 1024, 32, "cosine"),
    "instruction": (32, 1e-4, 0.1, 1, 1024, 16, "cosine"),
    "vision": (32, 0.1, 0.06, 10, 128, 128, "cosine"),  # warm-up and tokens are this project's defaults
}

#: A run of two steps, of any recipe.
TINY = {
    "giva.rank": 4,
    "giva.calibration-batch-size": 8,
    "train.batch-size": 4,
    "train.accumulation-steps": 1,
    "train.max-local-steps": 2,
    "rounds.num-rounds": 1,
}


def test_there_is_a_recipe_for_everything() -> None:
    assert RECIPES.keys() == DEMOS.keys() | PAPER.keys()


@pytest.mark.parametrize("name", sorted(DEMOS))
def test_a_demo_fits_what_data_prepare_makes(name: str) -> None:
    config = RunConfig.from_toml(RECIPES[name])
    folder, model = DEMOS[name]
    assert Path(config.data.folder) == folder / "sites"
    assert Path(config.model.path) == giva_home() / "models" / model
    assert len(config.task.labels) >= 2 or config.task.kind == "causal-lm"


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_recipe_of_the_paper_has_its_settings(name: str) -> None:
    config = RunConfig.from_toml(RECIPES[name])
    train = config.train
    found = (
        config.giva.rank,
        train.weight_decay,
        train.warmup_fraction,
        train.local_epochs * config.rounds.num_rounds,
        config.task.max_length,
        train.batch_size * train.accumulation_steps,
        train.schedule,
    )
    assert found == PAPER[name] and train.clip_norm == 1.0
    assert config.giva.dropout == (0.05 if name == "commonsense" else 0.0)


def test_the_recipe_of_vision_trains_a_tiny_model(tmp_path: Path) -> None:
    for split, count in (("train", 24), ("test", 6)):
        write_pictures(tmp_path / "data" / split, count, count)
    settings = {**TINY, "giva.calibration-batch-size": 24, "rounds.head-rounds": 1, "task.labels": ["above", "below"]}
    model = {"model.path": str(write_vision(tmp_path / "model")), "giva.rank": 2}
    config = RunConfig.from_toml(RECIPES["vision"], {**settings, **model})
    rounds = train_alone(config, site_at(tmp_path / "data", config)).rounds
    assert rounds[-1].evaluation and rounds[-1].evaluation.metrics.keys() == {"accuracy", "macro_f1", "mcc"}


@pytest.mark.parametrize("name", ["commonsense", "math", "code", "instruction", "answers"])
def test_a_recipe_of_answers_trains_a_tiny_model(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    for split, count in (("train", 16), ("test", 4)):
        write_rows(folder / f"{split}.jsonl", count, options=name == "commonsense", chat=name == "instruction")
    chats = {"data.messages-column": "messages"} if name == "instruction" else {}
    model = str(write_decoder(tmp_path / "model"))
    small = {"task.max-new-tokens": 2, "rounds.evaluate-every": 1}
    config = RunConfig.from_toml(RECIPES[name], {"model.path": model, **TINY, **small, **chats})
    (done,) = train_alone(config, site_at(folder, config), tmp_path / "adapter").rounds
    expected = {"math": {"exact_match"}, "commonsense": {"choice_accuracy"}}.get(name, set())
    assert done.evaluation and done.evaluation.metrics.keys() == {"token_accuracy", "perplexity"} | expected
    assert (tmp_path / "adapter").is_dir()


def test_the_recipe_of_glue_trains_a_tiny_model(tmp_path: Path, toy_model: Path) -> None:
    for split, count in (("train", 16), ("test", 4)):
        letters = [chr(ord("a") + index) for index in range(count)]
        rows = [json.dumps({"sentence": f"{letter} x y", "label": int(letter < "c")}) for letter in letters]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = {"model.path": str(toy_model), "data.text-column": "sentence", "task.max-length": 16, **TINY}
    config = RunConfig.from_toml(RECIPES["glue"], settings)
    (done,) = train_alone(config, site_at(tmp_path, config)).rounds
    assert done.evaluation and done.evaluation.metrics.keys() == {"accuracy", "macro_f1", "mcc"}
