"""GiVA behaves as a method of PEFT does. After PEFT's own `testing_common`: values are perturbed first, so that a
failure shows; toy shapes are unequal."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn

from giva_core import calibrate, inject
from giva_core.bases import bases_digest
from giva_core.checkpoint import save_bases
from giva_core.config import GivaConfig
from giva_core.errors import BasesError, ConfigError, DependencyError, NumericsError, ProtocolError, TargetError
from giva_core.types import Bases, BasesSet

peft = pytest.importorskip("peft", minversion="0.21")

from giva_core.peft import GivaLayer, GivaPeftConfig  # noqa: E402

SIZES = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
KINDS = {
    "mlp": (None, ("lin0", "lin1")),
    "bert": (transformers.BertConfig(**SIZES, intermediate_size=24), ("query", "intermediate.dense", "output.dense")),
    "gpt2": (transformers.GPT2Config(**SIZES, n_inner=24), ("c_attn", "c_fc", "mlp.c_proj")),
    "llama": (transformers.LlamaConfig(**SIZES, intermediate_size=24), ("q_proj", "down_proj")),
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 11)
        self.lin0, self.lin1, self.head = nn.Linear(11, 7), nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.lin1(torch.relu(self.lin0(self.embed(input_ids))))))


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(3)
    settings = KINDS[kind][0]
    made = Mlp() if settings is None else transformers.AutoModel.from_config(copy.deepcopy(settings))
    return made.to(dtype).eval()


def output(model, rows=4):
    tokens = torch.randint(1, 29, (rows, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=tokens)
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state


def bases_for(model, targets, seed=0, r=3):
    rng = np.random.default_rng(seed)
    layers, ranks = inject.layer_shapes(model, GivaConfig(rank=r, target_modules=targets))
    made = {}
    for layer, rank in zip(layers, ranks, strict=True):
        A = np.linalg.qr(rng.normal(size=(layer.d_in, rank)))[0].T
        B = np.linalg.qr(rng.normal(size=(layer.d_out, rank)))[0]
        made[layer.name] = Bases(A.astype(np.float32).copy(), B.astype(np.float32))
    return BasesSet(made, "rand", bases_digest(made, "rand"))


def perturb(model, adapter="default", seed=0):
    """Random vectors: an adapter that is not at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            for vectors in (layer.giva_lambda_o, layer.giva_lambda_s):
                if adapter in vectors:
                    vectors[adapter].copy_(torch.randn(vectors[adapter].shape, generator=generator))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GivaLayer)]


def adapted(kind, dtype=torch.float32, seed=0, **settings):
    """A model with one adapter away from its start, and the base model's output."""
    base = model_of(kind, dtype)
    before = output(base)
    config = GivaPeftConfig(bases=bases_for(base, KINDS[kind][1]), **settings)
    model = peft.get_peft_model(base, config).eval()
    perturb(model, seed=seed)
    return model, before


def loaded(kind, folder, **options):
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        return peft.PeftModel.from_pretrained(model_of(kind), str(folder), **options).eval()


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


def far(found, other):
    assert (found - other).abs().max() > 1e-2


# -- the start, training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_a_perturbed_one_does(kind):
    base = model_of(kind)
    before = output(base)
    bases = bases_for(base, KINDS[kind][1])
    model = peft.get_peft_model(base, GivaPeftConfig(bases=bases)).eval()
    assert torch.equal(output(model), before)
    assert len(layers_of(model)) == len(bases.layers)
    perturb(model)
    far(output(model), before)
    random = peft.get_peft_model(model_of(kind), GivaPeftConfig(bases=bases, init_weights=False)).eval()
    far(output(random), before)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_library_s_own_layers_do(kind):
    model, _ = adapted(kind)
    own = model_of(kind)
    inject.inject(own, bases_for(own, KINDS[kind][1]))
    named = dict(model.base_model.model.named_modules())
    vectors = {
        key: getattr(named[key.rpartition(".")[0]], f"giva_{key.rpartition('.')[2]}")["default"].detach().numpy()
        for key in inject.read_vectors(own)
    }
    inject.write_vectors(own, vectors)
    close(output(model), output(own), atol=1e-6)


def test_only_vectors_and_saved_modules_are_trained():
    model, _ = adapted("mlp", modules_to_save=["head"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {
        f"base_model.model.{lin}.giva_{v}.default" for lin in ("lin0", "lin1") for v in ("lambda_o", "lambda_s")
    }
    assert trained == expected | {f"base_model.model.head.modules_to_save.default.{w}" for w in ("weight", "bias")}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in trained}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.arange(12).view(2, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, _ = adapted("llama")
        model.train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=torch.arange(1, 13).view(2, 6)).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# -- save and load ----------------------------------------------------------------------------------------------------


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


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_output_and_unloading_gives_the_base_model_back(kind):
    model, before = adapted(kind)
    expected = output(model)
    far(expected, before)
    model.merge_adapter()
    close(output(model), expected)
    model.unmerge_adapter()
    close(output(model), expected)
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        close(output(model), before)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not layers_of(merged) and not any("giva" in name for name in merged.state_dict())
    close(output(merged), expected)
    unloaded = adapted(kind)[0].unload()
    assert torch.equal(output(unloaded), before) and not layers_of(unloaded)


def test_a_safe_merge_refuses_what_is_not_finite():
    model, _ = adapted("mlp")
    with torch.no_grad():
        layers_of(model)[1].giva_lambda_o["default"][0] = torch.inf
    with pytest.raises(NumericsError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_peft_can_convert_it_to_lora():
    convert = getattr(peft, "convert_to_lora", None)
    if convert is None:
        pytest.skip("this PEFT cannot convert")
    model, _ = adapted("mlp")
    assert model.supports_lora_conversion()
    settings, state = convert(model, rank=3)
    lora = peft.get_peft_model(model_of("mlp"), settings).eval()
    peft.set_peft_model_state_dict(lora, state)
    close(output(lora), output(model), atol=1e-4)


# -- several adapters -------------------------------------------------------------------------------------------------


def two_adapters(kind, **settings):
    model, before = adapted(kind, **settings)
    first = output(model)
    model.add_adapter("other", GivaPeftConfig(bases=bases_for(model_of(kind), KINDS[kind][1]), **settings))
    perturb(model, "other", seed=8)
    close(output(model), first, atol=0)
    return model, before, first


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_switched_disabled_and_deleted(kind):
    model, before, first = two_adapters(kind)
    model.set_adapter("other")
    other = output(model)
    far(other, first)
    active = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert active and all(name.endswith(".other") for name in active)
    with model.disable_adapter():
        assert torch.equal(output(model), before)
    model.set_adapter("default")
    assert torch.equal(output(model), first)
    model.delete_adapter("default")
    assert torch.equal(output(model), other) and list(model.peft_config) == ["other"]


def test_adapters_on_the_same_bases_share_them_also_after_a_move(tmp_path):
    model, _, _ = two_adapters("mlp", save_bases=False)
    model.save_pretrained(tmp_path)
    again = loaded("mlp", tmp_path, bases=bases_for(model_of("mlp"), KINDS["mlp"][1]))
    again.load_adapter(str(tmp_path / "other"), "other")  # finds the bases in the model
    for found in (model, again, copy.deepcopy(model).to("cpu", torch.float64)):
        for layer in layers_of(found):
            assert layer.giva_A["other"] is layer.giva_A["default"]
            assert layer.giva_A["other"].dtype == torch.float32
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(output(again), output(model))


def test_adapters_with_bases_of_their_own_live_side_by_side(tmp_path):
    model, _ = adapted("mlp")
    first = output(model)
    model.add_adapter("mine", GivaPeftConfig(bases=bases_for(model_of("mlp"), ("lin1",), seed=4, r=2)))
    perturb(model, "mine")
    model.set_adapter("mine")
    mine = output(model)
    far(mine, first)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(loaded("mlp", tmp_path / "mine")), mine)
    with pytest.raises(BasesError, match="different bases"):
        model.add_weighted_adapter(["default", "mine"], [0.5, 0.5], "both")


@pytest.mark.parametrize("kind", ["mlp", "gpt2"])
def test_a_weighted_adapter_is_the_sum_of_the_changes(tmp_path, kind):
    model, _, _ = two_adapters(kind)
    deltas = [
        0.7 * layer.get_delta_weight("default") - 0.2 * layer.get_delta_weight("other") for layer in layers_of(model)
    ]
    model.add_weighted_adapter(["default", "other"], [0.7, -0.2], "both")
    assert model.active_adapter == "default"
    for layer, expected in zip(layers_of(model), deltas, strict=True):
        close(layer.get_delta_weight("both"), expected)
    model.set_adapter("both")
    model.save_pretrained(tmp_path)
    again = loaded(kind, tmp_path / "both")
    assert torch.equal(output(again), output(model))
    again.add_weighted_adapter(["default"], [2.0], "twice")  # a residual counts too
    for layer, expected in zip(layers_of(again), deltas, strict=True):
        close(layer.get_delta_weight("twice"), 2 * expected, atol=1e-4)


def test_the_best_vectors_of_one_adapter_are_its_own():
    model, _, _ = two_adapters("mlp")
    model.add_weighted_adapter(["other"], [1.0], "same", combination_type="svd")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean", combination_type="svd")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "exact")
    for layer in layers_of(model):
        close(layer.get_delta_weight("same"), layer.get_delta_weight("other"))
        assert layer.giva_lambda_s["same"].sum() >= 0 and "mean" not in layer.giva_residual
        error = (layer.get_delta_weight("mean") - layer.get_delta_weight("exact")).norm()
        assert 0 < error < layer.get_delta_weight("exact").norm()


@pytest.mark.parametrize("combination", ["exact", "svd"])
def test_the_one_trained_head_comes_along(tmp_path, combination):
    """A classifier, which PEFT saves without being asked."""
    torch.manual_seed(3)
    settings = transformers.BertConfig(**SIZES, intermediate_size=24, num_labels=3)
    base = transformers.BertForSequenceClassification(settings).eval()
    bases = bases_for(base, KINDS["bert"][1])
    model = peft.get_peft_model(copy.deepcopy(base), GivaPeftConfig(bases=bases, task_type="SEQ_CLS"), "a").eval()
    perturb(model, "a")
    head = model.base_model.model.classifier.modules_to_save
    with torch.no_grad():
        head["a"].weight.normal_()
    tokens = torch.arange(1, 13).view(2, 6)

    def logits(found, adapter):
        found.set_adapter(adapter)
        with torch.no_grad():
            return found(input_ids=tokens).logits

    model.add_weighted_adapter(["a"], [1.0], "w", combination)
    assert not any(p.requires_grad for p in head["w"].parameters()) and head["a"].weight.requires_grad
    expected = logits(model, "a")
    close(logits(model, "w"), expected)
    assert head["w"].weight.requires_grad and head["w"].weight.data_ptr() != head["a"].weight.data_ptr()
    model.save_pretrained(tmp_path, selected_adapters=["w"])
    close(logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "w"), "w").eval(), "w"), expected)
    with pytest.raises(ConfigError, match="same module whole"):
        model.add_weighted_adapter(["a", "w"], [1.0, 1.0], "both")


@pytest.mark.parametrize("order", [["default", "headed"], ["headed", "default", "headed"]])
def test_the_head_comes_along_from_wherever_it_is(order):
    model, _ = adapted("mlp")
    bases = bases_for(model_of("mlp"), KINDS["mlp"][1])
    model.add_adapter("headed", GivaPeftConfig(bases=bases, modules_to_save=["head"]))
    head = model.base_model.model.head.modules_to_save
    with torch.no_grad():
        head["headed"].weight.normal_()
    model.add_weighted_adapter(order, [0.5] * len(order), "both")
    assert torch.equal(head["both"].weight, head["headed"].weight) and "default" not in head
    assert model.peft_config["both"].modules_to_save == ["head"] and not model.peft_config["default"].modules_to_save


def test_combinations_that_cannot_be_are_refused():
    model, _, _ = two_adapters("mlp", modules_to_save=["head"])
    refused = {
        "no adapter 'nobody'": (["default", "nobody"], [1, 1], "new", "exact"),
        "do not fit": (["default"], [1, 2], "new", "exact"),
        "already": (["default"], [1], "other", "exact"),
        "no such combination": (["default"], [1], "new", "cat"),
        "same module whole": (["default", "other"], [1, 1], "new", "exact"),
    }
    for text, arguments in refused.items():
        with pytest.raises(ConfigError, match=text):
            model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default", "other"]


@pytest.mark.parametrize("kind", ["mlp", "bert", "gpt2"])
def test_a_mixed_batch_takes_an_adapter_for_each_row(kind):
    saved = ["head"] if kind == "mlp" else None
    model, before, first = two_adapters(kind, modules_to_save=saved)
    if saved:
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["other"].weight.normal_()
    model.set_adapter("other")
    other = output(model)
    tokens = torch.randint(1, 29, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["other", "default", "__base__", "other"])
    mixed = mixed if isinstance(mixed, torch.Tensor) else mixed.last_hidden_state
    close(mixed, torch.stack([other[0], first[1], before[2], other[3]]))
    assert torch.equal(output(model), other)  # nothing stays behind
    with pytest.raises(ConfigError, match="no adapter 'nobody'"):
        model(input_ids=tokens, adapter_names=["nobody"] * 4)
    with pytest.raises(ProtocolError, match="2 adapter_names for 4 examples"):
        model(input_ids=tokens, adapter_names=["other", "default"])
    with pytest.raises(ConfigError, match="inference"):
        model.train()(input_ids=tokens, adapter_names=["other"] * 4)


# -- types, settings, errors ------------------------------------------------------------------------------------------


def test_vectors_and_bases_stay_float32_in_a_bfloat16_model(tmp_path):
    model, before = adapted("bert", torch.bfloat16)
    for layer in layers_of(model):
        kept = (layer.giva_lambda_o, layer.giva_lambda_s, layer.giva_A, layer.giva_B)
        assert {holder["default"].dtype for holder in kept} == {torch.float32}
    assert output(model).dtype == torch.bfloat16
    far(output(model).float(), before.float())
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(merged), output(model), rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path / "half")  # the bases' digest survives a cast
    assert torch.equal(output(loaded("bert", tmp_path)).isfinite(), torch.ones(4, 6, 16, dtype=torch.bool))
    loaded("bert", tmp_path / "half")


def test_a_part_of_the_layers_can_be_adapted(tmp_path):
    bases = bases_for(model_of("bert"), "all-linear")
    config = GivaPeftConfig(bases=bases, target_modules=["query", "value"])
    model = peft.get_peft_model(model_of("bert"), config).eval()
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, GivaLayer)}
    assert names == {"query", "value"} and config.bases_digest != bases.digest
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(loaded("bert", tmp_path)), output(model))
    everything = GivaPeftConfig(bases=bases, target_modules="all-linear")
    assert len(layers_of(peft.get_peft_model(model_of("bert"), everything))) == len(bases.layers)
    assert everything.bases_digest == bases.digest


def test_what_cannot_be_adapted_is_refused():
    bases = bases_for(model_of("mlp"), ("lin0",))
    with pytest.raises(BasesError, match=r"needs bases.*GivaPeftConfig.calibrate"):
        peft.get_peft_model(model_of("mlp"), GivaPeftConfig(target_modules=["lin0"]))
    with pytest.raises(BasesError, match="no bases for 'lin1'"):
        peft.get_peft_model(model_of("mlp"), GivaPeftConfig(bases=bases, target_modules=["lin0", "lin1"]))
    with pytest.raises(BasesError, match=r"another rank.*rank 3.*r = 4"):
        peft.get_peft_model(model_of("mlp"), GivaPeftConfig(bases=bases, r=4))
    wide = {"lin1": bases.layers["lin0"]}
    with pytest.raises(BasesError, match="do not fit the layer"):
        peft.get_peft_model(model_of("mlp"), GivaPeftConfig(bases=BasesSet(wide, "rand", bases_digest(wide, "rand"))))
    embed = {"embed": bases.layers["lin0"]}
    with pytest.raises(TargetError, match="'embed' cannot be adapted"):
        peft.get_peft_model(model_of("mlp"), GivaPeftConfig(bases=BasesSet(embed, "rand", "ab" * 32)))


def test_calibrate_builds_the_library_s_bases_and_leaves_the_head_out():
    settings = copy.deepcopy(KINDS["bert"][0])
    settings.num_labels = 3
    torch.manual_seed(3)
    model = transformers.BertForSequenceClassification(settings).eval()
    batch = {"input_ids": torch.arange(1, 25).view(4, 6), "labels": torch.tensor([0, 2, 1, 2])}
    config = GivaPeftConfig.calibrate(model, [batch], r=2, seed=5, task_type="SEQ_CLS")
    expected = calibrate(
        model, [batch], lambda m, b: (4 * m(**b).loss, 4), GivaConfig(rank=2, seed=5), exclude=["classifier"]
    )
    assert config.bases.digest == expected.digest and config.seed == 5
    tuned = peft.get_peft_model(model, config)
    assert tuned.peft_config["default"].r == 2 and "classifier" not in expected.layers
    tuned(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters() if parameter.requires_grad)


def test_peft_knows_the_method():
    assert peft.PeftType("GIVA") is peft.PeftType.GIVA and str(peft.PeftType.GIVA) == "PeftType.GIVA"
    assert copy.deepcopy(peft.PeftType.GIVA) is peft.PeftType.GIVA
    assert peft.get_model_status(adapted("bert")[0]).peft_types == {"default": "GIVA"}
    assert peft.get_peft_config({"peft_type": "GIVA"}) == GivaPeftConfig()


def test_peft_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    for name in [name for name in sys.modules if name == "giva_core.peft" or name.startswith("giva_core.peft.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DependencyError, match=r"needs PEFT.*fedgiva\[peft\]"):
        importlib.import_module("giva_core.peft")
