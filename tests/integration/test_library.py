"""`giva_core.calibrate` on one machine builds the bases of a federation of one site."""

from __future__ import annotations

import pytest

from client.alone import site_at, train_alone
from client.trainer import LocalTrainer
from giva_core import calibrate
from giva_core.errors import TargetError


def summed_loss(task):
    def loss_fn(model, batch):
        return task.task_loss(task.forward(batch), batch["labels"], reduction="sum"), len(batch["labels"])

    return loss_fn


@pytest.mark.parametrize("init", ["rand", "rowalign"])
def test_same_batches_same_digest(toy_config, toy_folder, init):
    config = toy_config.replace(rounds__head_rounds=0, rounds__num_rounds=1, giva__init=init)
    site = site_at(toy_folder / "site-3", config)
    trainer = LocalTrainer(site, config)
    task = trainer.backbone.task
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    batches = list(trainer.calibration_batches())
    bases = calibrate(task.model, batches, summed_loss(task), config.giva, exclude=task.head_modules)
    assert all((value == before[name]).all() for name, value in task.model.state_dict().items())
    assert [pair.A.shape[0] for pair in bases.layers.values()] == [4] * 6
    assert train_alone(config, site).bases_digest == bases.digest


def test_targets_that_match_nothing_are_refused_before_anything_runs(toy_config, toy_folder):
    trainer = LocalTrainer(site_at(toy_folder / "site-1", toy_config), toy_config)
    giva = toy_config.replace(giva__target_modules='["nowhere"]').giva
    with pytest.raises(TargetError, match="nowhere"):
        calibrate(trainer.backbone.task.model, [], summed_loss(trainer.backbone.task), giva)
