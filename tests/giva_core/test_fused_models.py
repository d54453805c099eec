"""Adapted models on long enough batches: attention kinds, gradient checkpointing, torch.compile."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from giva_core.layer import GivaLinear

R = 3
transformers = pytest.importorskip("transformers")


def plain_forward(layer: GivaLinear, x: Tensor) -> Tensor:
    """The folded form by PyTorch's own functions and their gradients."""
    return layer.base_layer(x) + F.linear(F.linear(x, layer.A), layer.coefficients())


def tiny(kind: str, attention: str = "sdpa") -> nn.Module:
    sizes = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**sizes, **dropout, intermediate_size=12, max_position_embeddings=64)
        model_class = transformers.BertForSequenceClassification
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=12, num_key_value_heads=1, use_cache=False)
        model_class = transformers.LlamaForCausalLM
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = model_class(config).requires_grad_(False)
    rng = np.random.default_rng(2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in ("classifier", "lm_head"):
            rows, columns = module.weight.shape
            A = np.linalg.qr(rng.normal(size=(columns, R)))[0].T.astype(np.float32)
            B = np.linalg.qr(rng.normal(size=(rows, R)))[0].astype(np.float32)
            layer = GivaLinear(module, A, B)
            nn.init.normal_(layer.lambda_o)
            model.set_submodule(name, layer)
    return model.train()


def model_gradients(model: nn.Module, call: Any = None) -> list[Tensor]:
    """Logits and the gradients of all vectors, on a batch with padding, long enough for both passes to fuse."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 13, (4, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    model.zero_grad()
    logits = (model if call is None else call)(input_ids=ids, attention_mask=mask).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_models_give_the_plain_forms_output_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    found = model_gradients(model)
    monkeypatch.setattr(GivaLinear, "forward", plain_forward)
    assert_same(found, model_gradients(model))


@pytest.mark.parametrize(("kind", "attention"), list(itertools.product(["bert", "llama"], ["eager", "sdpa"])))
def test_both_kinds_of_attention(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    assert model.config._attn_implementation == attention
    assert_same(model_gradients(model), model_gradients(tiny(kind)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradient_checkpointing(kind: str, use_reentrant: bool) -> None:
    model = tiny(kind)
    expected = model_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_same(model_gradients(model), expected)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_torch_compile(kind: str) -> None:
    model = tiny(kind)
    expected = model_gradients(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_same(model_gradients(model, torch.compile(model, backend="aot_eager")), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
