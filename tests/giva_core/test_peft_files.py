"""Adapters that PEFT saves and loads: files, digests, and what does not fit together."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from peft_models import (
    KINDS,
    adapted,
    bases_for,
    close,
    far,
    loaded,
    model_of,
    output,
    peft,
    perturb,
)
from safetensors.numpy import load_file, save_file

from giva_core.bases import bases_digest
from giva_core.checkpoint import save_bases
from giva_core.errors import BasesError
from giva_core.peft import GivaPeftConfig
from giva_core.types import Bases, BasesSet


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_loaded(tmp_path, kind, low_cpu_mem_usage):
    model, before = adapted(kind, seed=1)
    model.save_pretrained(tmp_path)
    again = loaded(kind, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(again), output(model))
    far(output(again), before)
    digest = again.peft_config["default"].bases_digest
    assert digest == model.peft_config["default"].bases_digest and len(digest) == 64
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = loaded(kind, tmp_path, is_trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())


def test_the_files_hold_vectors_bases_digest_and_no_path(tmp_path):
    bases = bases_for(model_of("mlp"), KINDS["mlp"][1])
    save_bases(tmp_path / "bases", bases)
    model = peft.get_peft_model(model_of("mlp"), GivaPeftConfig(bases=str(tmp_path / "bases"), seed=7))
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "GIVA" and settings["seed"] == 7 and settings["bases_digest"] == bases.digest
    assert "bases" not in settings and str(tmp_path) not in json.dumps(settings)
    keys = set(load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    parts = ("giva_lambda_o", "giva_lambda_s", "giva_A", "giva_B")
    assert keys == {
        "base_model.giva_digest", *(f"base_model.model.{lin}.{part}" for lin in ("lin0", "lin1") for part in parts)
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["mlp", "gpt2"])
def test_without_bases_an_adapter_is_small_and_has_to_be_given_them(tmp_path, kind):
    model, _ = adapted(kind, save_bases=False)
    model.save_pretrained(tmp_path)
    assert not any("giva_A" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    bases = bases_for(model_of(kind), KINDS[kind][1])
    assert torch.equal(output(loaded(kind, tmp_path, bases=bases)), output(model))
    with pytest.raises(BasesError, match="saved without its bases"):
        loaded(kind, tmp_path)
    with pytest.raises(BasesError, match="other bases"):
        loaded(kind, tmp_path, bases=bases_for(model_of(kind), KINDS[kind][1], seed=5))


def test_vectors_are_never_put_onto_other_bases(tmp_path):
    for name, seed in (("first", 0), ("second", 9)):
        for save in (True, False):
            base = model_of("mlp")
            bases = bases_for(base, KINDS["mlp"][1], seed)
            peft.get_peft_model(base, GivaPeftConfig(bases=bases, save_bases=save)).save_pretrained(
                tmp_path / f"{name}-{save}"
            )
    for save in (True, False):
        model = loaded("mlp", tmp_path / "first-True")
        with pytest.raises(BasesError, match=r"'default' has other bases than the weights to load.*digest"):
            model.load_adapter(str(tmp_path / f"second-{save}"), "default")
        own = GivaPeftConfig(bases=bases_for(model_of("mlp"), KINDS["mlp"][1]))
        with pytest.raises(BasesError, match="other bases"):
            peft.PeftModel.from_pretrained(model_of("mlp"), str(tmp_path / f"second-{save}"), config=own)


def test_a_changed_file_is_noticed(tmp_path):
    adapted("mlp")[0].save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lin0.giva_B"][0, 0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BasesError, match="damaged"):
        loaded("mlp", tmp_path)
    del tensors["base_model.giva_digest"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BasesError, match="does not tell the digest"):
        loaded("mlp", tmp_path)


def test_saved_settings_name_no_folder_to_read_from(tmp_path):
    model, _ = adapted("mlp", save_bases=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    save_bases(tmp_path / "elsewhere", bases_for(model_of("mlp"), KINDS["mlp"][1]))
    settings = json.loads(path.read_text()) | {"bases": str(tmp_path / "elsewhere")}
    path.write_text(json.dumps(settings))
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).bases is None
    with pytest.raises(BasesError, match="saved without its bases"):
        loaded("mlp", tmp_path)
    close(output(loaded("mlp", tmp_path, bases=str(tmp_path / "elsewhere"))), output(model))


@pytest.mark.parametrize("r", [10**12, 8, 0, None])
def test_settings_with_an_impossible_rank_are_refused(tmp_path, r):
    model, _ = adapted("mlp")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": r}))
    with pytest.raises(BasesError, match="cannot have the rank"):
        loaded("mlp", tmp_path)


@pytest.mark.parametrize("change", ["bfloat16", "no B"])
def test_bases_in_another_type_or_half_of_them_are_refused(tmp_path, change):
    model, _ = adapted("mlp")
    state = peft.get_peft_model_state_dict(model)
    if change == "no B":
        state = {key: value for key, value in state.items() if "giva_B" not in key}
        match = "come without bases|damaged"
    else:
        state = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
        match = "damaged"
    model.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BasesError, match=match):
        loaded("mlp", tmp_path)


def test_settings_without_weights_do_not_pass_for_an_adapter(tmp_path):
    adapted("mlp")[0].save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, GivaPeftConfig)
    model = peft.get_peft_model(model_of("mlp"), config)
    with pytest.raises(BasesError, match=r"has no bases yet.*from_pretrained"):
        output(model)


def test_ranks_that_differ_come_back(tmp_path):
    bases = bases_for(model_of("mlp"), ("lin0", "lin1"), r=5)
    cut = {"lin0": bases.layers["lin0"], "lin1": Bases(bases.layers["lin1"].A[:2], bases.layers["lin1"].B[:, :2])}
    uneven = BasesSet(cut, "rand", bases_digest(cut, "rand"))
    model = peft.get_peft_model(model_of("mlp"), GivaPeftConfig(bases=uneven)).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].r == 5 and model.peft_config["default"].ranks == {"lin1": 2}
    assert torch.equal(output(loaded("mlp", tmp_path)), output(model))


def test_it_can_be_injected_without_a_peft_model():
    bases = bases_for(model_of("mlp"), KINDS["mlp"][1])
    first = peft.inject_adapter_in_model(GivaPeftConfig(bases=bases), model_of("mlp"))
    perturb(first)
    state = peft.get_peft_model_state_dict(first)
    second = peft.inject_adapter_in_model(GivaPeftConfig(bases=bases), model_of("mlp"))
    peft.set_peft_model_state_dict(second, state)
    assert torch.equal(output(second), output(first))
