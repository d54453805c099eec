"""Bases on disk, and what makes two sites' models the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from client import backbone
from client.backbone import Backbone, get_backbone
from giva_core.config import RunConfig
from giva_core.errors import BasesError, public_reason
from giva_core.models import load_task_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIVA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cache" / "bases"


@pytest.mark.parametrize("digest", ["../../secret", "/etc", "A" * 64, "a" * 63, "a" * 64 + "\n", "."])
def test_a_digest_is_no_path(toy_config: RunConfig, cache: Path, digest: str) -> None:
    with pytest.raises(BasesError, match="no digest of bases") as caught:
        get_backbone(toy_config, "cpu").use(digest)
    assert public_reason(caught.value) == "bases: not a digest"


def test_bases_never_built_here_are_asked_for(toy_config: RunConfig, cache: Path) -> None:
    with pytest.raises(BasesError, match="does not hold the bases") as caught:
        get_backbone(toy_config, "cpu").use("a" * 64)
    assert public_reason(caught.value) == "bases: bases aaaaaaaaaaaa not held here"


def test_the_newest_bases_stay_on_disk(cache: Path) -> None:
    for number in range(11):
        folder = cache / f"{number:064x}"
        folder.mkdir(parents=True)
        os.utime(folder, (1000 - number, 1000 - number))
    (cache / "notes").mkdir()
    backbone._prune_cache()
    assert sorted(folder.name for folder in cache.iterdir()) == [*(f"{number:064x}" for number in range(8)), "notes"]


# -- the model's digest -----------------------------------------------------------------------------------------------


def changed(model: Path, folder: Path, file: str, change: dict[str, object]) -> Path:
    """A copy of the model with other values at the top of one of its JSON files."""
    shutil.copytree(model, folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


def digest_of(config: RunConfig, folder: Path) -> str:
    return load_task_model(config.replace(model__path=str(folder))).weights_digest()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"hidden_act": "relu"}),
        ("config.json", {"layer_norm_eps": 1e-5}),
        ("config.json", {"num_attention_heads": 4}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
        ("tokenizer_config.json", {"pad_token": "[SEP]"}),
        ("tokenizer_config.json", {"model_max_length": 9}),
    ],
)
def test_sites_that_compute_otherwise_do_not_look_the_same(
    toy_config: RunConfig, toy_model: Path, tmp_path: Path, file: str, change: dict[str, object]
) -> None:
    other = changed(toy_model, tmp_path / "other", file, change)
    assert digest_of(toy_config, other) != digest_of(toy_config, toy_model)


def test_another_order_of_the_words_is_another_model(toy_config: RunConfig, toy_model: Path, tmp_path: Path) -> None:
    model = json.loads((toy_model / "tokenizer.json").read_text())["model"]
    model["vocab"]["y"], model["vocab"]["z"] = model["vocab"]["z"], model["vocab"]["y"]
    other = changed(toy_model, tmp_path / "other", "tokenizer.json", {"model": model})
    assert digest_of(toy_config, other) != digest_of(toy_config, toy_model)


@pytest.mark.parametrize(
    "change", [{"transformers_version": "4.0.0"}, {"_name_or_path": "/secret"}, {"architectures": ["BertForMaskedLM"]}]
)
def test_noise_is_not_another_model(
    toy_config: RunConfig, toy_model: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    other = changed(toy_model, tmp_path / "other", "config.json", change)
    assert digest_of(toy_config, other) == digest_of(toy_config, toy_model)


def test_a_model_under_giva_home_loads_by_its_short_path(
    toy_config: RunConfig, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIVA_HOME", str(toy_model.parent))
    short = toy_config.replace(model__path=f"$GIVA_HOME/{toy_model.name}")
    assert Backbone(short, backbone.pick_device("cpu")).model_digest == digest_of(toy_config, toy_model)
