"""The site's work in this process, and what its policy changes in it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client import trainer
from client.backbone import model_loads
from client.policy import Policy, PolicyError
from client.site import SiteSettings
from client.trainer import LocalTrainer, drop_trainers, get_trainer
from client.training import examples_in_round, steps_in_round
from giva_core import calibration
from giva_core.config import RunConfig, TrainConfig
from giva_core.errors import DataError, GivaError, public_reason
from giva_core.protocol import TrainRequest, arrays_digest, trained_names

ROOMY = {"giva__rank": 2, "giva__oversampling": 2}  # sketches of 4 columns, twice, in layers of 16


def site_of(config: RunConfig, folder: Path, policy: Policy | None = None) -> SiteSettings:
    return SiteSettings("site-1", folder / "site-1", config.data, "cpu", policy)


def test_hello_counts_and_digests(toy_config: RunConfig, toy_folder: Path) -> None:
    trainer = LocalTrainer(site_of(toy_config, toy_folder), toy_config)
    hello = trainer.hello()
    assert (hello.site, hello.num_train, hello.num_eval, hello.device) == ("site-1", 24, 11, "cpu")
    assert hello.config_digest == toy_config.digest() and hello.schema == trainer.schema
    assert hello.state_digest == arrays_digest(trainer.initial_state())


def test_calibration_sees_the_same_examples_every_time(toy_config: RunConfig, toy_folder: Path) -> None:
    trainer = LocalTrainer(site_of(toy_config, toy_folder), toy_config)
    first, second = (trainer.calibrate(calibration.STAGES["range"], None, trainer.initial_state()) for _ in range(2))
    assert first[1:] == second[1:] and first[1] == 16
    shapes = calibration.sketch_shapes(
        calibration.STAGES["range"], trainer.schema.layers, trainer.schema.ranks, toy_config.giva
    )
    for name, sketch in first[0].items():
        assert sketch.codes.shape == shapes[name]
        np.testing.assert_array_equal(sketch.codes, second[0][name].codes)


def test_few_evaluation_rows_are_none(toy_config: RunConfig, toy_folder: Path) -> None:
    config = toy_config.replace(**ROOMY)
    enough = LocalTrainer(site_of(config, toy_folder, Policy(min_eval_examples=11)), config)
    few = LocalTrainer(site_of(config, toy_folder, Policy(min_eval_examples=12)), config)
    assert enough.hello().num_eval == 11 and few.hello().num_eval == 0
    with pytest.raises(DataError, match="no evaluation rows"):
        few.evaluate(few.initial_state(), "")


@pytest.mark.parametrize("policy", [None, Policy(), Policy(allow_share_counts=True)])
def test_counts_leave_where_run_and_site_agree(toy_config: RunConfig, toy_folder: Path, policy: Policy | None) -> None:
    config = toy_config.replace(**ROOMY)
    trainer = LocalTrainer(site_of(config, toy_folder, policy), config)
    evaluation = trainer.evaluate(trainer.initial_state(), "")
    assert bool(evaluation.counts) == (policy is None or policy.allow_share_counts)
    assert evaluation.num_examples == 11 and "accuracy" in evaluation.metrics


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (Policy(), {"method": "lora"}, "the method lora"),
        (Policy(), {"giva__rank": 8}, "sketches as wide"),
        (Policy(min_train_examples=25), {}, "min-train-examples"),
        (Policy(), {"giva__calibration_batch_size": 7}, "min-calibration-examples"),
        (Policy(), {"train__batch_size": 4, "train__max_local_steps": 1}, "min-round-examples"),
    ],
)
def test_a_policy_comes_before_the_work(
    toy_config: RunConfig, toy_folder: Path, policy: Policy, settings: dict[str, object], message: str
) -> None:
    config = toy_config.replace(**{**ROOMY, **settings})
    with pytest.raises(GivaError, match=message):
        LocalTrainer(site_of(config, toy_folder, policy), config)
    assert LocalTrainer(site_of(config, toy_folder), config).hello().num_train == 24


def test_a_refused_configuration_reads_no_row(toy_config: RunConfig, tmp_path: Path) -> None:
    config = toy_config.replace(giva__rank=8)  # the folder does not exist, and nobody looks
    with pytest.raises(PolicyError, match="sketches as wide"):
        LocalTrainer(site_of(config, tmp_path, Policy()), config)


@pytest.mark.parametrize(
    ("settings", "steps", "examples"),
    [
        ({}, 4, 25),
        ({"local_epochs": 3.0}, 12, 25),
        ({"max_local_steps": 1}, 1, 1),  # the short batch may be the only one
        ({"max_local_steps": 3}, 3, 17),
        ({"local_epochs": 0.5}, 2, 9),
        ({"local_epochs": 0.5, "accumulation_steps": 2}, 1, 9),
        ({"local_epochs": 1e-9, "batch_size": 25}, 1, 25),
    ],
)
def test_examples_behind_a_round(settings: dict[str, float], steps: int, examples: int) -> None:
    config = TrainConfig(**{"batch_size": 8, **settings})  # type: ignore[arg-type]
    assert (steps_in_round(25, config), examples_in_round(25, config)) == (steps, examples)


def test_head_rounds_compute_without_dropout_whether_or_not_the_inputs_are_kept(
    toy_config: RunConfig, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    monkeypatch.setattr("client.trainer.can_freeze", lambda *args: False)
    config = toy_config.replace(task__head="native")
    trainer = LocalTrainer(site_of(config, toy_folder), config)
    encoder = trainer.backbone.task.model.base_model
    assert isinstance(encoder, torch.nn.Module)
    handle = encoder.register_forward_hook(lambda module, args, output: modes.append(module.training))
    names = trained_names(trainer.schema, "head", "")
    trainer.train(TrainRequest(trainer.initial_state(), 1, 1, "", names, is_head_round=True))
    handle.remove()
    assert len(modes) == 3 and not any(modes)


def test_trainers_are_kept_by_site_and_run(toy_config: RunConfig, toy_folder: Path) -> None:
    drop_trainers()
    config = toy_config.replace(**ROOMY)
    site = site_of(config, toy_folder)
    first = get_trainer(site, config)
    assert get_trainer(site, config) is first
    guarded = get_trainer(site_of(config, toy_folder, Policy()), config)
    assert guarded is not first and guarded.policy == Policy() and first.policy is None
    assert json.loads(get_trainer(site, config.replace(giva__seed=5)).config.to_json())["giva.seed"] == 5
    assert get_trainer(site, config) is not first  # another run came between
    drop_trainers()


def test_another_model_than_the_site_names_is_refused(toy_config: RunConfig, toy_folder: Path) -> None:
    config = toy_config.replace(**ROOMY)
    right = LocalTrainer(site_of(config, toy_folder), config).backbone.model_digest
    named = replace(site_of(config, toy_folder), model_digest=right)
    assert LocalTrainer(named, config).hello().model_digest == right
    with pytest.raises(GivaError, match="not the one that the site file names") as caught:
        LocalTrainer(replace(named, model_digest="0" * 64), config)
    assert public_reason(caught.value) == "config: the site's model has another digest than its settings say"


def test_metrics_that_may_not_leave_take_the_counts_with_them(toy_config: RunConfig, toy_folder: Path) -> None:
    config = toy_config.replace(**ROOMY)
    site = site_of(config, toy_folder, Policy(metrics=("mcc",), allow_share_counts=True))
    trainer = LocalTrainer(site, config)
    evaluation = trainer.evaluate(trainer.initial_state(), "")
    assert set(evaluation.metrics) == {"mcc"} and not evaluation.counts and evaluation.num_examples == 11


def test_model_and_rows_serve_the_next_run(toy_config: RunConfig, toy_folder: Path, tmp_path: Path) -> None:
    drop_trainers()
    shutil.copytree(toy_folder / "site-1", tmp_path / "site-1")
    config = toy_config.replace(**ROOMY)
    site = site_of(config, tmp_path)
    first = get_trainer(site, config)
    loads = model_loads()
    second = get_trainer(site, config.replace(train__learning_rate=0.5, rounds__num_rounds=9))
    assert second is not first and second.backbone is first.backbone and model_loads() == loads
    assert second._train is first._train and second._eval is first._eval
    path = site.train_path
    path.write_text(path.read_text(encoding="utf-8") * 2, encoding="utf-8")
    third = get_trainer(site, config)
    assert third.backbone is first.backbone and third.hello().num_train == 2 * first.hello().num_train
    assert get_trainer(site, config.replace(task__max_length=9)).backbone is not first.backbone
    assert model_loads() == loads + 1
    drop_trainers()


def test_every_step_is_told(toy_config: RunConfig, toy_folder: Path) -> None:
    trainer = LocalTrainer(site_of(toy_config, toy_folder), toy_config)
    told: list[tuple[int, int]] = []
    trainer.on_step = lambda step, steps: told.append((step, steps))
    names = trained_names(trainer.schema, "head", "")
    trainer.train(TrainRequest(trainer.initial_state(), 1, 1, "", names, is_head_round=True))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_broken_link_in_a_folder_of_images_is_no_fault_of_its_state(tmp_path: Path) -> None:
    (tmp_path / "label").mkdir()
    before = trainer._state_of(tmp_path)
    (tmp_path / "label" / "gone.png").symlink_to(tmp_path / "nowhere")
    assert trainer._state_of(tmp_path) != before
