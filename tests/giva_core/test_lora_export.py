"""An exported LoRA computes what the trained adapter computes, on every kind of linear layer."""

from __future__ import annotations

import json
import re
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from test_export import TEXTS, logits_of, make_config, trained_adapter, write_model

from giva_core import inject
from giva_core.bases import bases_digest
from giva_core.checkpoint import load_adapter, save_adapter
from giva_core.errors import CheckpointError
from giva_core.lora_export import CONFIG_FILE, WEIGHTS_FILE, lora_matrices, lora_to_folder
from giva_core.models import load_task_model
from giva_core.types import BasesSet

peft = pytest.importorskip("peft")

#: Configuration class, targets: plain linear layers, Conv1D, gated MLP without biases.
KINDS = {
    "bert": (transformers.BertConfig, ("query", "intermediate.dense", "output.dense")),
    "roberta": (transformers.RobertaConfig, ("query", "attention.output.dense")),
    "gpt2": (transformers.GPT2Config, ("c_attn", "c_fc", "mlp.c_proj")),
    "llama": (transformers.LlamaConfig, ("q_proj", "v_proj", "down_proj")),
}


def prepared(folder, kind, head="native", method="giva", **changes):
    """A tiny model and the configuration of a run on it."""
    settings, targets = KINDS[kind]
    config = make_config(write_model(folder, kind=settings), head, method)
    return config.replace(giva__target_modules=json.dumps(targets), **changes)


def loaded_by_peft(config, folder):
    """The plain base model, its head started otherwise, with the exported LoRA on it."""
    model = load_task_model(config.replace(giva__seed=7)).model
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning):  # of missing keys, unmatched patterns, Conv1D not declared
            warnings.simplefilter("error", kind)
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def peft_logits(model, task):
    with torch.no_grad():
        return model(**task.collate(task.encode(TEXTS))).logits


@pytest.mark.parametrize("residual", [False, True], ids=["vectors", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same_logits(tmp_path, kind, residual):
    config = prepared(tmp_path / "base", kind, rounds__mode="exact" if residual else "fedavg")
    trained = trained_adapter(tmp_path / "adapter", config, residual=residual)
    expected = logits_of(trained)
    folder = lora_to_folder(tmp_path / "adapter", tmp_path / "lora", tmp_path / "base")
    model = loaded_by_peft(config, folder)
    found = peft_logits(model, trained)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert (peft_logits(model, trained) - expected).abs().max() > 0.1
    assert any(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_peft_s_own_merge_computes_them_too(tmp_path, kind):
    config = prepared(tmp_path / "base", kind)
    trained = trained_adapter(tmp_path / "adapter", config)
    model = loaded_by_peft(config, lora_to_folder(tmp_path / "adapter", tmp_path / "lora", tmp_path / "base"))
    torch.testing.assert_close(peft_logits(model.merge_and_unload(), trained), logits_of(trained), rtol=0, atol=1e-5)


def test_ranks_that_differ_go_into_patterns_and_every_scale_is_one(tmp_path):
    config = prepared(tmp_path / "base", "bert", giva__rank=8)
    task = load_task_model(config)
    trained_adapter(tmp_path / "adapter", config)
    adapter = load_adapter(tmp_path / "adapter")
    cut = {}
    for index, (name, layer) in enumerate(adapter.bases.layers.items()):
        r = 3 + index % 4
        cut[name] = type(layer)(layer.A[:r], layer.B[:, :r])
        adapter.arrays[f"{name}.lambda_s"] = adapter.arrays[f"{name}.lambda_s"][:r]
    bases = BasesSet(cut, "rand", bases_digest(cut, "rand"))
    heads = adapter.metadata.head_modules
    save_adapter(tmp_path / "uneven", bases, adapter.arrays, config, head_modules=heads)
    folder = lora_to_folder(tmp_path / "uneven", tmp_path / "lora")
    settings = json.loads((folder / CONFIG_FILE).read_text())
    assert settings["r"] == settings["lora_alpha"] == 6 and settings["rank_pattern"] == settings["alpha_pattern"]
    assert set(settings["rank_pattern"].values()) == {3, 4, 5}
    model = loaded_by_peft(config, folder)
    scales = {s for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer) for s in m.scaling.values()}
    assert scales == {1.0}
    inject.inject(task.model, bases)
    state = {name: value for name, value in adapter.arrays.items() if not name.endswith(("lambda_o", "lambda_s"))}
    inject.write_vectors(task.model, {k: v for k, v in adapter.arrays.items() if k not in state})
    inject.write_state(task.model, state)
    torch.testing.assert_close(peft_logits(model, task), logits_of(task), rtol=0, atol=1e-5)


def test_the_mean_head_goes_along_as_a_saved_module(tmp_path):
    config = prepared(tmp_path / "base", "bert", head="mean")
    trained = trained_adapter(tmp_path / "adapter", config)
    folder = lora_to_folder(tmp_path / "adapter", tmp_path / "lora")
    settings = json.loads((folder / CONFIG_FILE).read_text())
    assert settings["modules_to_save"] == ["classifier"] and settings["task_type"] is None
    torch.testing.assert_close(
        peft_logits(loaded_by_peft(config, folder), trained), logits_of(trained), rtol=0, atol=1e-5
    )


def test_a_head_of_several_modules_is_saved_whole(tmp_path):
    """A federation's server knows RoBERTa's head by its two layers only, and PEFT wraps what holds them."""
    config = prepared(tmp_path / "base", "roberta")
    trained = trained_adapter(tmp_path / "trained", config)
    adapter = load_adapter(tmp_path / "trained")
    parts = ("classifier.dense", "classifier.out_proj")
    save_adapter(tmp_path / "adapter", adapter.bases, adapter.arrays, config, head_modules=parts)
    folder = lora_to_folder(tmp_path / "adapter", tmp_path / "lora")
    assert json.loads((folder / CONFIG_FILE).read_text())["modules_to_save"] == ["classifier"]
    torch.testing.assert_close(
        peft_logits(loaded_by_peft(config, folder), trained), logits_of(trained), rtol=0, atol=1e-5
    )


def test_a_trained_lora_is_exported_with_its_scale(tmp_path):
    config = prepared(tmp_path / "base", "bert", method="lora", lora__rank=3, lora__alpha=12.0)
    trained = trained_adapter(tmp_path / "adapter", config)
    folder = lora_to_folder(tmp_path / "adapter", tmp_path / "lora")
    assert json.loads((folder / CONFIG_FILE).read_text())["lora_alpha"] == 3
    torch.testing.assert_close(
        peft_logits(loaded_by_peft(config, folder), trained), logits_of(trained), rtol=0, atol=1e-5
    )


def test_the_matrices_are_those_of_the_formula(tmp_path):
    config = prepared(tmp_path / "base", "bert", rounds__mode="exact")
    trained_adapter(tmp_path / "adapter", config, residual=True)
    adapter = load_adapter(tmp_path / "adapter")
    for name, (A, B) in lora_matrices(adapter).items():
        layer, lo = adapter.bases.layers[name], adapter.arrays[f"{name}.lambda_o"]
        assert np.array_equal(A, layer.A) and B.dtype == np.float32 and B.shape == layer.B.shape
        expected = np.diag(lo) @ layer.B @ np.diag(adapter.arrays[f"{name}.lambda_s"])
        np.testing.assert_allclose(B, expected + adapter.residual[f"{name}.residual"] * layer.B, rtol=0, atol=1e-6)


def test_files_hold_no_path_of_the_machine_and_need_no_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    config = prepared(tmp_path / "base", "gpt2")
    trained_adapter(tmp_path / "adapter", config)
    folder = lora_to_folder(tmp_path / "adapter", tmp_path / "lora", tmp_path / "base")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
    settings = json.loads((folder / CONFIG_FILE).read_text())
    assert settings["base_model_name_or_path"] == "base" and settings["fan_in_fan_out"] is True
    assert str(tmp_path) not in "".join(path.read_text("latin-1") for path in folder.iterdir())
    keys = set(load_file(folder / WEIGHTS_FILE))
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in keys
    assert {key for key in keys if "lora_" not in key} == {"base_model.model.score.weight"}


@pytest.mark.parametrize(
    ("head", "kind"), [("mean", "classification"), ("native", "classification"), ("native", "regression")]
)
def test_the_card_s_code_runs(tmp_path, monkeypatch, head, kind):
    config = prepared(tmp_path / "base", "bert", head, task__kind=kind)  # labels do not count where a number is learned
    trained = trained_adapter(tmp_path / "adapter", config)
    lora_to_folder(tmp_path / "adapter", tmp_path / "this-folder")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "this-folder" / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    torch.testing.assert_close(peft_logits(names["model"].eval(), trained), logits_of(trained), rtol=0, atol=1e-5)
    if kind == "classification":
        assert names["model"].config.id2label == dict(enumerate(config.task.labels))


def test_what_is_no_lora_is_refused(tmp_path):
    config = prepared(tmp_path / "base", "bert", method="head")
    trained_adapter(tmp_path / "adapter", config)
    with pytest.raises(CheckpointError, match=r"no low-rank form.*method 'head'.*--format merged"):
        lora_to_folder(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_arrays_of_no_known_module_are_refused(tmp_path):
    config = prepared(tmp_path / "base", "bert")
    trained_adapter(tmp_path / "adapter", config)
    adapter = load_adapter(tmp_path / "adapter")
    save_adapter(tmp_path / "headless", adapter.bases, adapter.arrays, config)
    with pytest.raises(CheckpointError, match="belongs to no module"):
        lora_to_folder(tmp_path / "headless", tmp_path / "lora")


def test_an_existing_folder_is_left_alone(tmp_path):
    trained_adapter(tmp_path / "adapter", prepared(tmp_path / "base", "bert"))
    with pytest.raises(CheckpointError, match="not empty"):
        lora_to_folder(tmp_path / "adapter", tmp_path / "base")
    assert (tmp_path / "base" / "config.json").exists()
