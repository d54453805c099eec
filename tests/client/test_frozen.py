"""Head training over kept inputs is head training, without the backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.data import read_rows
from client.frozen import FrozenHead, can_freeze, head_inputs
from client.site import SiteSettings
from client.trainer import LocalTrainer
from client.training import EncodedData, predict
from giva_core.models import load_task_model
from giva_core.protocol import TrainRequest, trained_names


@pytest.fixture
def task_and_data(toy_config, toy_folder):
    task = load_task_model(toy_config)
    rows = read_rows(toy_folder / "site-2" / "train.jsonl", toy_config.task, toy_config.data)
    features = task.encode_rows(rows.rows, 16)
    return task, EncodedData(features, rows.labels, [len(item["input_ids"]) for item in features])


def test_the_head_alone_gives_the_whole_model_s_outputs(toy_config, task_and_data):
    task, data = task_and_data
    kept = head_inputs(task, data, toy_config.train)
    whole, whole_loss = predict(task, data, toy_config.train)
    alone, alone_loss = predict(FrozenHead(task), kept, toy_config.train)
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(alone, whole, atol=1e-5)
    assert alone_loss == pytest.approx(whole_loss, rel=1e-5)
    np.testing.assert_allclose([np.linalg.norm(row) for row in kept.features], 10.0, rtol=1e-5)


def test_the_head_alone_computes_in_float32_under_autocast(toy_config, task_and_data):
    task, data = task_and_data
    kept = head_inputs(task, data, toy_config.train)
    batch = FrozenHead(task).collate(kept.features, kept.labels)
    expected = FrozenHead(task).forward(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(FrozenHead(task).forward(batch), expected)


def test_training_over_kept_inputs_is_training_the_head(toy_config, toy_folder, monkeypatch):
    site = SiteSettings("site-2", toy_folder / "site-2", toy_config.data, "cpu")
    trainer = LocalTrainer(site, toy_config)
    assert any(module.p > 0 for module in trainer.backbone.task.model.modules() if isinstance(module, torch.nn.Dropout))
    names = trained_names(trainer.schema, "head", "")
    request = TrainRequest(trainer.initial_state(), 1, 1, "", names, is_head_round=True)
    kept = trainer.train(request)
    monkeypatch.setattr("client.trainer.can_freeze", lambda *args: False)
    whole = trainer.train(request)
    assert kept.num_steps == whole.num_steps == 4
    for name in names:
        assert np.abs(kept.arrays[name] - request.arrays[name]).max() > 1e-3
        np.testing.assert_allclose(kept.arrays[name], whole.arrays[name], atol=2e-4)


def test_other_heads_and_much_data_go_through_the_backbone(toy_config, task_and_data):
    task, _ = task_and_data
    assert can_freeze(task, task.head_modules, 1000)
    assert not can_freeze(task, (*task.head_modules, "bert.embeddings"), 1000)
    assert not can_freeze(task, task.head_modules, 10**9)
    native = load_task_model(toy_config.replace(task__head="native"))
    assert not can_freeze(native, native.head_modules, 1000)
