"""Wrapping, and reading and writing what is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from toy_modules import HIDDEN, INNER, LABELS, Toy, make_bases

from giva_core.config import GivaConfig
from giva_core.errors import BasesError, ConfigError, NumericsError, ProtocolError, TargetError
from giva_core.inject import (
    adapted_layers,
    adapter_disabled,
    inject,
    layer_shapes,
    merge,
    module_state_names,
    read_state,
    read_vectors,
    remove,
    set_trainable,
    summary,
    unmerge,
    write_residual,
    write_state,
    write_vectors,
)
from giva_core.layer import GivaLinear
from giva_core.targets import find_targets
from giva_core.types import BasesSet, LayerShape

TOKENS = torch.arange(8).reshape(2, 4)


def adapted(perturbed: bool = True, **options: object) -> Toy:
    """A toy model with adapters, by default away from their start, so that a failure shows."""
    torch.manual_seed(0)
    model = Toy().eval()
    inject(model, make_bases(*layer_shapes(model, GivaConfig(rank=4), exclude=["head"])), trainable=["head"], **options)
    if perturbed:
        rng = np.random.default_rng(1)
        write_vectors(model, {n: rng.normal(size=a.shape).astype(np.float32) for n, a in read_vectors(model).items()})
    return model


# -- wrapping -----------------------------------------------------------------------------------------


def test_inject_changes_nothing_at_the_start_and_freezes_the_rest() -> None:
    torch.manual_seed(0)
    plain = Toy().eval()
    model = adapted(perturbed=False)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*read_vectors(model), "head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}


def test_dropout_and_training_mode_reach_the_layers() -> None:
    model = adapted(dropout=0.25)
    assert {layer.dropout.p for layer in adapted_layers(model).values()} == {0.25}
    assert not any(layer.training for layer in adapted_layers(model).values())


def test_remove_gives_the_base_model_back() -> None:
    torch.manual_seed(0)
    plain = Toy().eval()
    model = adapted()
    assert not torch.allclose(model(TOKENS), plain(TOKENS))
    remove(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(model(TOKENS), plain(TOKENS))


def test_merge_then_remove_gives_a_plain_model_with_the_same_outputs() -> None:
    model = adapted()
    y = model(TOKENS)
    merge(model)
    torch.testing.assert_close(model(TOKENS), y)
    remove(model)
    assert not adapted_layers(model)
    torch.testing.assert_close(model(TOKENS), y)


def test_unmerge_is_bit_exact() -> None:
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    merge(model)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_adapter_disabled_also_after_an_error() -> None:
    torch.manual_seed(0)
    plain = Toy().eval()
    model = adapted()
    y = model(TOKENS)
    with pytest.raises(KeyError), adapter_disabled(model):
        assert torch.equal(model(TOKENS), plain(TOKENS))
        raise KeyError
    assert torch.equal(model(TOKENS), y)


def test_merged_models_refuse_what_would_go_unseen() -> None:
    model = adapted()
    vectors = read_vectors(model)
    merge(model)
    for call in (lambda: write_vectors(model, vectors), lambda: write_residual(model, {})):
        with pytest.raises(TargetError, match="merged"):
            call()
    with pytest.raises(TargetError, match="merged"), adapter_disabled(model):
        pass


def test_inject_refuses_and_leaves_the_model_as_it_was() -> None:
    model = Toy()
    layers, ranks = layer_shapes(model, GivaConfig(rank=4), exclude=["head"])
    good = make_bases(layers, ranks)
    other = make_bases((*layers[:3], LayerShape("blocks.1.down", HIDDEN, INNER + 1)), ranks)
    with pytest.raises(BasesError, match=r"'blocks.1.down'"):
        inject(model, other)
    with pytest.raises(BasesError, match="no bases"):
        inject(model, BasesSet({}, "rand", ""))
    with pytest.raises(TargetError, match=r"'blocks.7.up'"):
        inject(model, make_bases((LayerShape("blocks.7.up", INNER, HIDDEN),), (4,)))
    with pytest.raises(TargetError, match=r"'heads'.*head"):
        inject(model, good, trainable=["heads"])
    with pytest.raises(TargetError, match="adapted and trained whole"):
        inject(model, good, trainable=["blocks.1"])
    assert not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    inject(model, good)
    with pytest.raises(TargetError, match="already"):
        inject(model, good)


def test_set_trainable_switches_the_vectors() -> None:
    model = adapted()
    set_trainable(model, {"lambda_s"})
    assert all(
        layer.lambda_s.requires_grad and not layer.lambda_o.requires_grad for layer in adapted_layers(model).values()
    )
    set_trainable(model, {"lambda_o", "lambda_s"})
    assert all(
        layer.lambda_s.requires_grad and layer.lambda_o.requires_grad for layer in adapted_layers(model).values()
    )
    with pytest.raises(ConfigError, match="lambda_x"):
        set_trainable(model, {"lambda_x"})


def test_summary_counts() -> None:
    model = adapted()
    counted = summary(model)
    assert counted.layers == 4
    assert counted.vector_parameters == 2 * (INNER + HIDDEN + 2 * 4)
    assert counted.other_parameters == HIDDEN * LABELS + 3 * LABELS
    assert counted.total_parameters == sum(p.numel() for p in model.parameters())
    assert counted.share == pytest.approx((48 + 27) / counted.total_parameters)
    set_trainable(model, {"lambda_s"})
    assert summary(model).vector_parameters == 4 * 4


# -- arrays -------------------------------------------------------------------------------------------


def test_vectors_round_trip_and_are_copies() -> None:
    model, other = adapted(), adapted(perturbed=False)
    vectors = read_vectors(model)
    assert list(vectors)[:2] == ["blocks.0.up.lambda_o", "blocks.0.up.lambda_s"]
    assert {a.dtype for a in vectors.values()} == {np.dtype(np.float32)}
    write_vectors(other, vectors)
    assert torch.equal(other(TOKENS), model(TOKENS))
    vectors["blocks.0.up.lambda_o"][:] = 99
    assert float(adapted_layers(model)["blocks.0.up"].lambda_o.detach().max()) < 99


def spoil(vectors: dict[str, np.ndarray], how: str) -> None:
    name = "blocks.1.down.lambda_s"
    if how == "missing":
        del vectors[name]
    elif how == "unexpected":
        vectors["blocks.1.down.lambda_z"] = vectors[name]
    elif how == "wrong shape":
        vectors[name] = vectors[name][:, None]
    elif how == "floating":
        vectors[name] = vectors[name].astype(np.int32)
    elif how == "not finite":
        vectors[name] = np.full_like(vectors[name], np.nan)
    else:
        vectors[name] = np.full(vectors[name].shape, 1e300)


@pytest.mark.parametrize(
    "how", ["missing", "unexpected", "wrong shape", "floating", "not finite", "too large for float32"]
)
def test_bad_vectors_are_refused_by_name_before_anything_is_written(how: str) -> None:
    model = adapted()
    before = read_vectors(model)
    changed = {name: array + 1 for name, array in before.items()}
    spoil(changed, how)
    kind = NumericsError if how in ("not finite", "too large for float32") else ProtocolError
    with pytest.raises(kind, match=r"blocks\.1\.down\.lambda_[sz]"):
        write_vectors(model, changed)
    after = read_vectors(model)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_vectors_of_any_float_type_and_layout_are_accepted() -> None:
    model = adapted()
    vectors = read_vectors(model)
    write_vectors(model, {name: array.astype(">f8")[::-1] for name, array in vectors.items()})
    assert all(np.array_equal(array, vectors[name][::-1]) for name, array in read_vectors(model).items())


def test_residual_is_added_and_taken_away() -> None:
    model = adapted()
    y = model(TOKENS)
    rng = np.random.default_rng(2)
    residuals = {
        n: rng.normal(size=tuple(layer.B.shape)).astype(np.float32) for n, layer in adapted_layers(model).items()
    }
    write_residual(model, residuals)
    layer = adapted_layers(model)["blocks.0.down"]
    expected = (
        (torch.outer(layer.lambda_o, layer.lambda_s) + torch.tensor(residuals["blocks.0.down"])) * layer.B @ layer.A
    )
    torch.testing.assert_close(layer.delta_weight(), expected.detach())
    assert not torch.allclose(model(TOKENS), y)
    write_residual(model, {})
    assert torch.equal(model(TOKENS), y)
    del residuals["blocks.0.up"]
    with pytest.raises(ProtocolError, match=r"blocks\.0\.up"):
        write_residual(model, residuals)


def test_head_state_round_trips_with_its_floating_buffers() -> None:
    model, other = adapted(), adapted()
    found = module_state_names(model, ["head"])
    assert found == (
        "head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias", "head.1.running_mean", "head.1.running_var",
    )  # fmt: skip
    state = {name: array + 0.5 for name, array in read_state(model, found).items()}
    write_state(other, state)
    assert all(np.array_equal(array, state[name]) for name, array in read_state(other, found).items())
    assert module_state_names(model, []) == ()


def test_state_of_low_precision_travels_as_float32() -> None:
    model = nn.Sequential(nn.Linear(2, 3).bfloat16())
    state = read_state(model, ["0.weight"])
    assert state["0.weight"].dtype == np.float32
    write_state(model, {"0.weight": state["0.weight"] * 2})
    assert model[0].weight.dtype == torch.bfloat16
    assert np.array_equal(read_state(model, ["0.weight"])["0.weight"], state["0.weight"] * 2)


def test_bad_state_is_refused_by_name() -> None:
    model = adapted()
    before = read_state(model, ["head.0.bias"])
    with pytest.raises(ProtocolError, match=r"head\.9\.bias"):
        write_state(model, {"head.0.bias": before["head.0.bias"] + 1, "head.9.bias": np.zeros(3, np.float32)})
    with pytest.raises(NumericsError, match=r"head\.0\.weight"):
        write_state(
            model, {"head.0.bias": before["head.0.bias"] + 1, "head.0.weight": np.full((3, 6), np.inf, np.float32)}
        )
    assert np.array_equal(read_state(model, ["head.0.bias"])["head.0.bias"], before["head.0.bias"])
    with pytest.raises(ProtocolError, match=r"head\.9\.bias"):
        read_state(model, ["head.9.bias"])
    with pytest.raises(TargetError, match="'nohead'"):
        module_state_names(model, ["nohead"])


# -- GPT-2 --------------------------------------------------------------------------------------------


def test_gpt2_conv1d_layers_are_adapted_and_merged() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=17, n_positions=9)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    layers, ranks = layer_shapes(model, GivaConfig(rank=3))
    assert layers[0] == LayerShape("transformer.h.0.attn.c_attn", 36, 12)
    assert len(layers) == 8, "lm_head is tied and left out"
    inject(model, make_bases(layers, ranks))
    rng = np.random.default_rng(1)
    start = model(input_ids=TOKENS).logits
    write_vectors(model, {n: rng.normal(size=a.shape).astype(np.float32) for n, a in read_vectors(model).items()})
    y = model(input_ids=TOKENS).logits
    assert not torch.allclose(start, y)
    merge(model)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, y, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(input_ids=TOKENS).logits, y)
    with pytest.raises(TargetError, match=r"lm_head.*wte"):
        find_targets(model, ("lm_head",))
    assert isinstance(model.transformer.h[0].attn.c_attn, GivaLinear)
