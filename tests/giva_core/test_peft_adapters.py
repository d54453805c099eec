"""Merging an adapter into its model, and several adapters in one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft_models import (
    KINDS,
    SIZES,
    adapted,
    bases_for,
    close,
    far,
    layers_of,
    loaded,
    model_of,
    output,
    peft,
    perturb,
)

from giva_core.errors import BasesError, ConfigError, NumericsError, ProtocolError
from giva_core.peft import GivaPeftConfig

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


def test_a_trained_head_of_several_layers_stays_when_adapters_are_merged():
    settings = transformers.RobertaConfig(**SIZES, intermediate_size=24)
    base = transformers.AutoModelForSequenceClassification.from_config(settings)
    config = GivaPeftConfig(bases=bases_for(base, ("query",)), task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config).eval()
    perturb(model)
    tokens = torch.randint(2, 29, (4, 6), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens).logits
    merged = model.merge_and_unload()
    assert type(merged.classifier).__name__ == "RobertaClassificationHead"
    close(merged(input_ids=tokens).logits, expected)


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


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beam_search_repeats_the_adapter_of_each_example(kind):
    torch.manual_seed(3)
    if kind == "llama":
        base, targets = transformers.LlamaForCausalLM(copy.deepcopy(KINDS["llama"][0])), KINDS["llama"][1]
    else:
        sizes = {"vocab_size": 29, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0)
        base, targets = transformers.T5ForConditionalGeneration(config), ("q", "wo")
    model = peft.get_peft_model(base, GivaPeftConfig(bases=bases_for(base, targets)))
    perturb(model)
    model.eval()
    tokens = torch.randint(1, 29, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    mixed = model.generate(input_ids=tokens, adapter_names=["default", "__base__"], **options)
    adapter = model.generate(input_ids=tokens, **options)
    with model.disable_adapter():
        plain = model.generate(input_ids=tokens, **options)
    assert not torch.equal(adapter, plain)
    assert torch.equal(mixed, torch.stack([adapter[0], plain[1]]))
