"""A bank computes for every task, switched or row by row, what the task's own adapted model computes."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import transformers
from test_export import logits_of, make_config, trained_adapter, write_model
from toy_modules import make_bases

from giva_core import bank_files, inject
from giva_core.adapter_bank import AdapterBank
from giva_core.bank_layers import BankLinear
from giva_core.checkpoint import load_adapter, save_adapter, save_bases
from giva_core.errors import BasesError, CheckpointError, NumericsError, ProtocolError, TargetError
from giva_core.export import apply_adapter
from giva_core.models import load_task_model

TASKS = ("heart", "brain", "skin")


@pytest.fixture
def config(tmp_path):
    return make_config(write_model(tmp_path / "base"), "native")


def adapters_on_shared_bases(config, root, kinds=("", "residual", "labels")):
    """Adapter folders of three tasks: with vectors alone, with a residual, and with another number of outputs."""
    trained_adapter(root / "first", config)
    first = load_adapter(root / "first")
    folders = {}
    for index, (task, kind) in enumerate(zip(TASKS, kinds, strict=True)):
        rng = np.random.default_rng(10 + index)
        arrays = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in first.arrays.items()}
        own = config
        if kind == "labels":
            own = config.replace(task__labels='["a", "b", "c", "d", "e"]')
            arrays |= {"classifier.weight": rng.normal(size=(5, 16)).astype(np.float32)}
            arrays |= {"classifier.bias": rng.normal(size=5).astype(np.float32)}
        residual = {
            f"{name}.residual": rng.normal(size=layer.B.shape).astype(np.float32)
            for name, layer in first.bases.layers.items()
            if kind == "residual"
        }
        known = first.metadata
        folders[task] = save_adapter(
            root / task, first.bases, arrays, own,
            residual=residual, model_digest=known.model_digest, head_modules=known.head_modules,
        )  # fmt: skip
    return folders


def filled(config, tmp_path, **options):
    """The bank of the three tasks, and the logits of each task's own model."""
    folders = adapters_on_shared_bases(config, tmp_path)
    expected = {}
    for task, folder in folders.items():
        bank_files.add_task(tmp_path / "bank", folder, task)
        adapter = load_adapter(folder)
        own = load_task_model(config.replace(task__labels=json.dumps(adapter.metadata.config.task.labels)))
        apply_adapter(own, adapter)
        expected[task] = logits_of(own)
    task = load_task_model(config)
    expected[None] = logits_of(task)
    return AdapterBank.open(task, tmp_path / "bank", **options), task, expected


def test_switching_gives_each_task_its_own_logits(config, tmp_path):
    bank, task, expected = filled(config, tmp_path)
    assert sorted(bank.names) == sorted(TASKS) and bank.active is None
    for name in ("skin", "heart", None, "brain", "heart"):
        bank.switch(name)
        assert bank.active == name
        torch.testing.assert_close(logits_of(task), expected[name], rtol=1e-6, atol=1e-5)
    assert (expected["heart"] - expected[None]).abs().max() > 0.1
    assert expected["skin"].shape == (2, 5) and expected["heart"].shape == (2, 3)


@pytest.mark.parametrize("names", [("heart", "brain"), ("brain", None), ("skin", "heart"), ("heart", "heart")])
def test_each_row_goes_through_its_own_adapter(config, tmp_path, names):
    bank, task, expected = filled(config, tmp_path)
    bank.switch("skin")
    with bank.route(names):
        mixed = logits_of(task)
    for row, name in enumerate(names):
        own = expected[name][row]
        torch.testing.assert_close(mixed[row, : len(own)], own, rtol=1e-6, atol=1e-5)
        assert (mixed[row, len(own) :] == -torch.inf).all()
    torch.testing.assert_close(logits_of(task), expected["skin"], rtol=1e-6, atol=1e-5)  # as before the context


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(transformers.GPT2Config, '["c_attn", "mlp.c_proj"]'), (transformers.LlamaConfig, '["q_proj", "down_proj"]')],
)
def test_decoders_are_routed_too(tmp_path, kind, targets):
    config = make_config(write_model(tmp_path / "base", kind=kind), "native").replace(giva__target_modules=targets)
    own = trained_adapter(tmp_path / "heart", config)
    bank_files.add_task(tmp_path / "bank", tmp_path / "heart", "heart")
    task = load_task_model(config)
    plain = logits_of(task)
    bank = AdapterBank.open(task, tmp_path / "bank")
    with bank.route([None, "heart"]):
        mixed = logits_of(task)
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(mixed[1], logits_of(own)[1], rtol=1e-6, atol=1e-5)
    assert (mixed[1] - plain[1]).abs().max() > 0.1


def test_rows_without_an_adapter_are_the_base_model_s_to_the_last_bit(config, tmp_path):
    bank, task, expected = filled(config, tmp_path)
    with bank.route([None, None]):
        assert torch.equal(logits_of(task), expected[None])
    plain = bank.close()
    assert torch.equal(logits_of(task), expected[None])
    assert not any(isinstance(module, BankLinear) for module in plain.modules())


def test_adapters_come_and_go_and_the_table_grows(config, tmp_path):
    bank, task, expected = filled(config, tmp_path, names=["heart"])
    adapter = load_adapter(tmp_path / "brain")
    for index in range(5):
        bank.add(f"copy-{index}", adapter.arrays, adapter.residual)
    bank.switch("copy-4")
    torch.testing.assert_close(logits_of(task), expected["brain"], rtol=1e-6, atol=1e-5)
    bank.remove("copy-4")
    assert bank.active is None and torch.equal(logits_of(task), expected[None])
    bank.add("again", load_adapter(tmp_path / "heart").arrays)  # takes the row of copy-4, and nothing of its residual
    bank.switch("again")
    torch.testing.assert_close(logits_of(task), expected["heart"], rtol=1e-6, atol=1e-5)
    bank.switch("heart")
    torch.testing.assert_close(logits_of(task), expected["heart"], rtol=1e-6, atol=1e-5)


def test_memory_is_that_of_the_numbers(config, tmp_path):
    bank, _, _ = filled(config, tmp_path, names=["heart"])
    head = 3 * 16 + 3
    extra = sum(value.size for name, value in load_adapter(tmp_path / "heart").arrays.items() if "pooler" in name)
    vectors = sum(sum(layer.B.shape) for layer in bank.bases.layers.values())
    assert bank.nbytes == 4 * (2 * vectors + head + extra)  # one row for the base model, one for the adapter


def test_half_precision_halves_the_memory_and_keeps_three_digits(config, tmp_path):
    bank, task, expected = filled(config, tmp_path, names=["heart", "brain"], dtype=torch.float16)
    full, _, _ = filled(config, tmp_path / "again", names=["heart", "brain"])
    assert 2 * bank.nbytes == full.nbytes
    bank.switch("brain")
    torch.testing.assert_close(logits_of(task), expected["brain"], rtol=2e-2, atol=2e-2)
    with bank.route(["brain", "heart"]):
        torch.testing.assert_close(logits_of(task)[0], expected["brain"][0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("array", ["vector", "residual", "classifier.weight"])
def test_numbers_too_large_for_the_stored_type_are_refused(config, tmp_path, array):
    bank, task, _ = filled(config, tmp_path, names=["heart"], dtype=torch.float16)
    adapter = load_adapter(tmp_path / "brain")
    arrays, residual = dict(adapter.arrays), dict(adapter.residual)
    name = {"vector": next(iter(adapter.metadata.schema.vector_shapes())), "residual": next(iter(residual))}.get(
        array, array
    )
    given = residual if array == "residual" else arrays
    given[name] = np.full_like(given[name], 7e4)
    with pytest.raises(NumericsError, match=r"not finite in float16.*dtype=torch\.float32"):
        bank.add("large", arrays, residual)
    assert bank.names == ("heart",)
    full = AdapterBank.open(load_task_model(config), tmp_path / "bank", ["heart"])
    full.add("large", arrays, residual)
    assert full.names == ("heart", "large")
    bank.add("brain", adapter.arrays, adapter.residual)  # the refused one took no row
    bank.switch("brain")
    assert logits_of(task).isfinite().all()


def test_a_bfloat16_model_is_served(tmp_path):
    config = make_config(write_model(tmp_path / "base"), dtype="bfloat16")
    trained = trained_adapter(tmp_path / "heart", config)
    bank_files.add_task(tmp_path / "bank", tmp_path / "heart", "heart")
    task = load_task_model(config)
    bank = AdapterBank.open(task, tmp_path / "bank")
    with bank.route(["heart", "heart"]):
        torch.testing.assert_close(logits_of(task), logits_of(trained), rtol=0.1, atol=0.1)


def test_beams_follow_their_example_and_other_shapes_are_refused(config, tmp_path):
    bank, task, _ = filled(config, tmp_path)
    layer = next(module for module in task.model.modules() if isinstance(module, BankLinear))
    x = torch.randn(2, 5, layer.A.shape[1])
    with bank.route(["heart", "brain"]):
        single = layer(x)
        assert torch.allclose(layer(x.repeat_interleave(3, 0)), single.repeat_interleave(3, 0), atol=1e-6)
        assert torch.allclose(layer(x[:, 0]), single[:, 0], atol=1e-6)
        assert torch.allclose(layer(x.unflatten(1, (5, 1))).flatten(1, 2), single, atol=1e-6)
        for wrong in (x[:1], x.repeat(2, 1, 1)[:3], x.flatten(0, 1)):
            with pytest.raises(ProtocolError, match="one entry for each example"):
                layer(wrong)


def test_a_bank_folder_holds_the_bases_once(config, tmp_path):
    _, _, _ = filled(config, tmp_path)
    found = sorted(str(path.relative_to(tmp_path / "bank")) for path in (tmp_path / "bank").rglob("*.*"))
    digest = load_adapter(tmp_path / "heart").metadata.bases_digest
    assert found == sorted(
        [f"bases/{digest}/bases.safetensors"]
        + [f"tasks/{task}/{file}" for task in TASKS for file in ("adapter.json", "vectors.safetensors")]
    )
    assert bank_files.list_tasks(tmp_path / "bank") == dict.fromkeys(sorted(TASKS), digest)


def test_tasks_on_other_bases_may_lie_beside_but_not_be_opened_together(config, tmp_path):
    filled(config, tmp_path)
    task = load_task_model(config)
    layers, ranks = inject.layer_shapes(task.model, config.giva, exclude=task.head_modules)
    bases = make_bases(layers, ranks, np.random.default_rng(77))
    arrays = {
        k: v for k, v in load_adapter(tmp_path / "heart").arrays.items() if not k.startswith(("classifier", "bert.p"))
    }
    save_adapter(tmp_path / "other", bases, arrays, config)
    bank_files.add_task(tmp_path / "bank", tmp_path / "other", "other")
    with pytest.raises(BasesError, match="do not share their bases"):
        AdapterBank.open(task, tmp_path / "bank")
    assert AdapterBank.open(task, tmp_path / "bank", ["other"]).names == ("other",)
    with pytest.raises(BasesError, match="other bases"):
        bank_files.read_task(tmp_path / "bank", "heart", bases)


def test_what_does_not_fit_is_refused(config, tmp_path):
    bank, task, _ = filled(config, tmp_path)
    adapter = load_adapter(tmp_path / "heart")
    vector = next(iter(adapter.metadata.schema.vector_shapes()))
    with pytest.raises(ProtocolError, match="has an adapter 'heart' already"):
        bank.add("heart", adapter.arrays)
    with pytest.raises(ProtocolError, match=r"does not fit the bank.*no such array"):
        bank.add("new", {k: v for k, v in adapter.arrays.items() if k != vector})
    with pytest.raises(ProtocolError, match="does not fit the bank"):
        bank.add("new", {**adapter.arrays, vector: np.zeros(1, np.float32)})
    with pytest.raises(ProtocolError, match="does not fit the bank"):
        bank.add("new", {**adapter.arrays, "classifier.weight": np.zeros((3, 15), np.float32)})
    with pytest.raises(NumericsError, match="not finite"):
        bank.add("new", {**adapter.arrays, vector: np.full_like(adapter.arrays[vector], np.nan)})
    with pytest.raises(ProtocolError, match=r"no adapter 'hart'; expected for example heart"):
        bank.switch("hart")
    with pytest.raises(ProtocolError, match="a name for each example"), bank.route([]):
        pass
    assert "new" not in bank.names
    with pytest.raises(TargetError, match="adapted already"):
        AdapterBank(task.model, bank.bases)


def test_files_that_do_not_fit_are_refused(config, tmp_path):
    filled(config, tmp_path)
    bank = tmp_path / "bank"
    other = load_task_model(make_config(write_model(tmp_path / "other", seed=1), "native"))
    with pytest.raises(CheckpointError, match=r"task 'brain' was trained on another base model"):
        AdapterBank.open(other, bank)
    with pytest.raises(CheckpointError, match="no task 'hart'"):
        AdapterBank.open(load_task_model(config), bank, ["hart"])
    with pytest.raises(CheckpointError, match=r"a task 'heart' already.*--name"):
        bank_files.add_task(bank, tmp_path / "heart", "heart")
    with pytest.raises(CheckpointError, match="no digest of bases"):
        bank_files.read_bases(bank, "../heart")
    with pytest.raises(CheckpointError, match="no name for a task"):
        bank_files.add_task(bank, tmp_path / "heart", "../heart")
    with pytest.raises(CheckpointError, match="no tasks"):
        bank_files.list_tasks(tmp_path)
    trained_adapter(tmp_path / "head", config.replace(method="head"))
    with pytest.raises(CheckpointError, match="no bases to share"):
        bank_files.add_task(bank, tmp_path / "head", "head")
    (file,) = (bank / "bases").rglob("bases.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        AdapterBank.open(load_task_model(config), bank)


def test_two_processes_may_add_the_first_tasks_at_once(config, tmp_path, monkeypatch):
    folders = adapters_on_shared_bases(config, tmp_path)
    bank, replace, waiting = tmp_path / "bank", os.replace, ["brain"]

    def overtaken(source, target):
        if waiting:  # between the first look and the last step, the other process adds its task
            task = waiting.pop()
            bank_files.add_task(bank, folders[task], task)
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    bank_files.add_task(bank, folders["heart"], "heart")
    assert sorted(AdapterBank.open(load_task_model(config), bank).names) == ["brain", "heart"]
    assert len(list((bank / "bases").iterdir())) == 1


def test_bases_under_the_name_of_others_are_refused(config, tmp_path):
    trained_adapter(tmp_path / "heart", config)
    adapter = load_adapter(tmp_path / "heart")
    layers, ranks = inject.layer_shapes(load_task_model(config).model, config.giva, exclude=("classifier",))
    home = tmp_path / "bank" / "bases" / adapter.metadata.bases_digest
    save_bases(home, make_bases(layers, ranks, np.random.default_rng(77)))
    with pytest.raises(CheckpointError, match="other bases than its name tells"):
        bank_files.add_task(tmp_path / "bank", tmp_path / "heart", "heart")
    assert not (tmp_path / "bank" / "tasks").exists()


def test_a_full_disk_leaves_no_half_task(config, tmp_path, monkeypatch):
    trained_adapter(tmp_path / "heart", config)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        bank_files.add_task(tmp_path / "bank", tmp_path / "heart", "heart")
    assert [path for path in (tmp_path / "bank").rglob("*") if path.is_file()] == []
