"""The adapted layer: forward, what it keeps for the backward pass, types, merging."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_modules import D_IN, D_OUT, R, make_base, make_layer

from giva_core.errors import BasesError, NumericsError, TargetError
from giva_core.layer import GivaLinear, is_adaptable, linear_shape, unwrap
from giva_core.types import LayerShape

TOKENS = 5


def written_out_delta(layer: GivaLinear) -> Tensor:
    """diag(lambda_o) B diag(lambda_s) A + (R ∘ B) A, as the paper writes it, in float64."""
    A, B, o, s = (t.detach().double() for t in (layer.A, layer.B, layer.lambda_o, layer.lambda_s))
    delta = torch.diag(o) @ B @ torch.diag(s) @ A
    return delta if layer.residual is None else delta + (layer.residual.double() * B) @ A


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_delta_is_exactly_zero_at_the_start(kind: str) -> None:
    made = make_layer(kind)
    fresh = GivaLinear(make_base(kind), made.A.numpy(), made.B.numpy())
    x = torch.randn(TOKENS, D_IN)
    assert torch.equal(fresh.delta_weight(), torch.zeros_like(fresh.weight))
    assert torch.equal(fresh(x), fresh.base_layer(x))
    assert fresh.lambda_o.dtype == fresh.lambda_s.dtype == torch.float32
    assert torch.equal(fresh.lambda_s, torch.ones(R))


def test_at_the_start_only_lambda_o_has_a_gradient() -> None:
    made = make_layer()
    fresh = GivaLinear(make_base("linear"), made.A.numpy(), made.B.numpy())
    fresh(torch.randn(TOKENS, D_IN)).square().sum().backward()
    assert torch.equal(fresh.lambda_s.grad, torch.zeros(R))
    assert fresh.lambda_o.grad.abs().min() > 0


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_delta_weight_is_the_papers_formula_in_the_bases_layout(kind: str, residual: bool) -> None:
    layer = make_layer(kind, residual=residual)
    expected = written_out_delta(layer)
    assert layer.delta_weight().shape == layer.weight.shape
    assert layer.delta_weight().dtype == torch.float32
    torch.testing.assert_close(layer.delta_weight(), (expected if kind == "linear" else expected.T).float())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", [(TOKENS,), (2, TOKENS), (2, 1, TOKENS)])
def test_forward_is_the_base_plus_delta(kind: str, residual: bool, shape: tuple[int, ...]) -> None:
    layer = make_layer(kind, residual=residual)
    x = torch.randn(*shape, D_IN)
    expected = layer.base_layer(x) + x @ written_out_delta(layer).float().T
    torch.testing.assert_close(layer(x), expected)


def test_gradients_are_those_of_the_written_out_formula() -> None:
    layer = make_layer(residual=True)
    x = torch.randn(TOKENS, D_IN, requires_grad=True)
    target = torch.randn(TOKENS, D_OUT)
    (layer(x) * target).sum().backward()
    found = [layer.lambda_o.grad.clone(), layer.lambda_s.grad.clone(), x.grad.clone()]
    layer.zero_grad()
    x.grad = None
    h = layer.lambda_o * ((x @ layer.A.T * layer.lambda_s) @ layer.B.T) + (x @ layer.A.T) @ (layer.residual * layer.B).T
    ((layer.base_layer(x) + h) * target).sum().backward()
    for a, b in zip(found, [layer.lambda_o.grad, layer.lambda_s.grad, x.grad], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_the_input_nor_an_output_sized_tensor_is_kept(requires_grad: bool, dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    x = torch.randn(2, TOKENS, D_IN, dtype=dtype, requires_grad=requires_grad)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    per_token = [
        t for t in kept if t.numel() >= 2 * TOKENS * R and t.numel() % (2 * TOKENS) == 0 and t is not layer.weight
    ]
    assert kept, "the hooks saw nothing"
    assert {t.numel() for t in per_token} == {2 * TOKENS * R}
    assert all(t.data_ptr() != x.data_ptr() for t in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base_keeps_float32_vectors(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    x = torch.randn(TOKENS, D_IN).to(dtype)
    y = layer(x)
    y.float().sum().backward()
    expected = layer.base_layer(x).double() + x.double() @ written_out_delta(layer).T
    assert y.dtype == dtype
    assert layer.lambda_o.grad.dtype == layer.lambda_s.grad.dtype == torch.float32
    assert (y - expected).norm() / expected.norm() < 0.02


def test_casting_the_model_leaves_bases_and_vectors_float32() -> None:
    model = nn.Sequential(make_layer(residual=True))
    layer = model[0]
    before = {name: getattr(layer, name).clone() for name in ("A", "B", "residual", "lambda_o", "lambda_s")}
    layer(torch.randn(TOKENS, D_IN))
    model.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    for name, value in before.items():
        assert torch.equal(getattr(layer, name), value), name
    assert layer(torch.randn(TOKENS, D_IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.to(torch.float32)
    assert layer(torch.randn(TOKENS, D_IN)).dtype == torch.float32


def test_moving_to_another_device_moves_everything() -> None:
    layer = make_layer(residual=True).to("meta")
    assert {t.device.type for t in (layer.A, layer.B, layer.residual, layer.lambda_o, layer.weight)} == {"meta"}
    assert layer(torch.empty(TOKENS, D_IN, device="meta")).shape == (TOKENS, D_OUT)


def test_autocast_computes_in_its_type() -> None:
    layer = make_layer()
    x = torch.randn(TOKENS, D_IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        delta = layer.delta_weight()
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lambda_o.grad.dtype == torch.float32
    assert torch.equal(delta, layer.delta_weight()), "ΔW is float32 under autocast too"
    assert (y - layer(x)).norm() / layer(x).norm() < 0.02


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    layer = make_layer()
    x = torch.randn(TOKENS, D_IN, requires_grad=True)
    layer(x).square().sum().backward()
    expected = layer.lambda_o.grad.clone()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(layer.lambda_o.grad, expected)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    layer = make_layer(dropout=0.5)
    x = torch.randn(TOKENS, D_IN)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.delta_weight().T)
    layer.train()
    torch.manual_seed(3)
    dropped = layer.dropout(x)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + dropped @ layer.delta_weight().T)
    assert not torch.equal(dropped, x)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_merged_forward_is_the_adapters_and_unmerge_is_bit_exact(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    layer = make_layer(kind, dtype, residual=True)
    x = torch.randn(TOKENS, D_IN).to(dtype)
    before, y = layer.weight.clone(), layer(x)
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.weight, before)
    assert (layer(x) - y).norm() / y.norm() < tolerance
    merged = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, merged), "merging twice adds nothing"
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_merge_refuses_a_weight_that_overflows() -> None:
    layer = make_layer(dtype=torch.float16)
    before = layer.weight.clone()
    with torch.no_grad():
        layer.lambda_o.fill_(1e8)
    with pytest.raises(NumericsError, match="not finite"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_a_copy_of_a_merged_layer_unmerges_alone() -> None:
    layer = make_layer()
    before = layer.weight.clone()
    layer.merge()
    other = copy.deepcopy(layer)
    other.unmerge()
    assert torch.equal(other.weight, before)
    assert not torch.equal(layer.weight, before)


def test_disabled_layer_is_the_base() -> None:
    layer = make_layer()
    x = torch.randn(TOKENS, D_IN)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


def test_looks_like_a_linear_layer() -> None:
    layer = make_layer()
    assert (layer.in_features, layer.out_features, layer.rank) == (D_IN, D_OUT, R)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert set(layer.state_dict()) == {"lambda_o", "lambda_s", "base_layer.weight", "base_layer.bias"}
    assert f"d_out={D_OUT}, d_in={D_IN}, r={R}" in repr(layer)


def test_linear_shape_reads_both_layouts_and_through_the_adapter() -> None:
    for kind in ("linear", "conv1d"):
        layer = make_layer(kind)
        assert linear_shape(layer, "a") == linear_shape(unwrap(layer), "a") == LayerShape("a", D_OUT, D_IN)


def test_layers_that_cannot_be_adapted() -> None:
    class Masked(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 0

    assert not is_adaptable(Masked(D_IN, D_OUT))
    assert not is_adaptable(nn.MultiheadAttention(D_IN, 1).out_proj)
    assert not is_adaptable(nn.Conv1d(D_IN, D_OUT, 1))
    assert not is_adaptable(nn.utils.parametrizations.weight_norm(nn.Linear(D_IN, D_OUT)))
    with pytest.raises(TargetError, match=r"'x\.norm'.*LayerNorm"):
        linear_shape(nn.LayerNorm(D_IN), "x.norm")


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((R, D_OUT), (D_IN, R)), ((R, D_IN), (D_OUT, R + 1)), ((R, D_IN, 1), (D_OUT, R)), ((0, D_IN), (D_OUT, 0))],
)
def test_bases_that_do_not_fit_are_refused(a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    with pytest.raises(BasesError, match="do not fit"):
        GivaLinear(make_base("linear"), np.ones(a_shape, np.float32), np.ones(b_shape, np.float32))


def test_bases_that_are_not_finite_are_refused() -> None:
    A, B = np.ones((R, D_IN), np.float32), np.ones((D_OUT, R), np.float32)
    B[2, 1] = np.nan
    with pytest.raises(BasesError, match="B of 'base_layer'"):
        GivaLinear(make_base("linear"), A, B)
