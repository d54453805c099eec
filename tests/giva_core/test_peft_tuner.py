"""GiVA behaves as a method of PEFT does. After PEFT's own `testing_common`: values are perturbed first, so that a
failure shows; toy shapes are unequal."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
import transformers
from peft_models import (
    KINDS,
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

from giva_core import calibrate, inject
from giva_core.bases import bases_digest
from giva_core.config import GivaConfig
from giva_core.errors import BasesError, DependencyError, TargetError
from giva_core.peft import GivaLayer, GivaPeftConfig
from giva_core.types import BasesSet

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


def gradients_of(model):
    """Output, and the gradients of all vectors side by side, by whatever way the layers take."""
    model.zero_grad()
    found = model(input_ids=torch.arange(1, 25).view(4, 6))
    found = found if isinstance(found, torch.Tensor) else found.last_hidden_state
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
    (found.float() * target).sum().backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_and_its_base_layer_are_one_product(kind, residual, cast):
    model, _ = adapted(kind)
    if residual:
        model.add_weighted_adapter(["default"], [0.5], "sum")
        perturb(model, "sum", seed=2)
        model.set_adapter("sum")
    if cast:  # PEFT's containers cast the vectors too
        model.bfloat16()
    together = gradients_of(model)
    for layer in layers_of(model):
        layer.base_layer.register_forward_hook(lambda *_: None)  # a layer with a hook is called as a module
    for found, expected in zip(together, gradients_of(model), strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= (0.05 if cast else 1e-5) * expected.norm()


def test_when_the_base_layer_is_called_as_a_module():
    model, _ = adapted("mlp", giva_dropout=0.5)
    layer = model.base_model.model.lin0
    x = torch.randn(4, 11, requires_grad=True)

    def is_one_product():
        return layer(x).grad_fn.next_functions[0][0].name() == "_AdaptedLinearBackward"  # a view of it is returned

    assert is_one_product()
    model.train()
    assert not is_one_product(), "dropout"
    model.eval()
    model.add_adapter("other", GivaPeftConfig(bases=bases_for(model_of("mlp"), KINDS["mlp"][1], seed=4)))
    assert is_one_product()
    model.base_model.set_adapter(["default", "other"])
    assert not is_one_product(), "two adapters"
    model.set_adapter("other")
    layer.base_layer.weight.requires_grad_(True)
    assert not is_one_product(), "a base that is trained"


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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"exclude_modules": ["value"]}, {"0.attention.self.query", "1.attention.self.query"}),
        ({"exclude_modules": r".*\.1\..*"}, {"0.attention.self.query", "0.attention.self.value"}),
        ({"layers_to_transform": [1], "layers_pattern": "layer"}, {"1.attention.self.query", "1.attention.self.value"}),
    ],
)
def test_layers_are_left_out_as_with_lora_and_not_calibrated(tmp_path, settings, expected):
    base = model_of("bert")
    batch = {"input_ids": torch.arange(1, 25).view(4, 6)}

    def loss(model, batch):
        return model(**batch).last_hidden_state.square().sum(), 4

    targets = {"r": 2, "target_modules": ["query", "value"], **settings}
    config = GivaPeftConfig.calibrate(base, [batch], loss, **targets)
    assert {name.removeprefix("encoder.layer.") for name in config.bases.layers} == expected
    lora = peft.get_peft_model(model_of("bert"), peft.LoraConfig(**targets))
    model = peft.get_peft_model(base, config).eval()
    assert layer_names(model) == layer_names(lora) == {f"base_model.model.encoder.layer.{name}" for name in expected}
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(loaded("bert", tmp_path)), output(model))
    chosen = GivaPeftConfig(bases=bases_for(model_of("bert"), ("query", "value")), **settings)  # of all those
    assert layer_names(peft.get_peft_model(model_of("bert"), chosen)) == layer_names(lora)


def layer_names(model):
    return {
        name for name, module in model.named_modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }


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
    with pytest.raises(TargetError, match="exclude_modules and layers_to_transform leave no target"):
        GivaPeftConfig.calibrate(model_of("mlp"), [], target_modules=["lin0"], exclude_modules=["lin0"])
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
