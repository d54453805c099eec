"""The layer as one product: equal to the plain form in value and gradients, little is kept, and when it stands back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toy_modules import D_IN, D_OUT, R, make_layer

from giva_core.fused import adapted_linear, is_fused_cheaper
from giva_core.layer import GivaLinear

#: Both passes fold; only the backward pass fuses; both fuse.
FEW, SOME, MANY = 4, 9, 40


def plain_forward(layer: GivaLinear, x: Tensor) -> Tensor:
    """The folded form by PyTorch's own functions and their gradients."""
    M = layer.coefficients()
    return layer.base_layer(x) + F.linear(F.linear(x, layer.A.to(x.dtype)), M.to(x.dtype))


def results(layer: GivaLinear, forward: object, x: Tensor, target: Tensor) -> list[Tensor]:
    """Output and the gradients of x, lambda_o and lambda_s."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = forward(x)  # type: ignore[operator]
    (y * target).sum().backward()
    return [y.detach(), x.grad, layer.lambda_o.grad.clone(), layer.lambda_s.grad.clone()]


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(tokens, D_IN, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(tokens, D_OUT, generator=generator, dtype=torch.float64).to(dtype)


class Shapes(TorchDispatchMode):
    """Counts the matrices of the shape of the weight that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        if isinstance(out, Tensor) and not func.is_view:  # type: ignore[attr-defined]
            self.weights += tuple(out.shape) in {(D_OUT, D_IN), (D_IN, D_OUT)}
        return out


def test_the_rule_counts_products() -> None:
    assert 4 * (D_IN + D_OUT) < D_IN * D_OUT < 5 * (D_IN + D_OUT)
    assert [is_fused_cheaper(n, D_IN, D_OUT) for n in (4, 5)] == [False, True]
    assert [is_fused_cheaper(n, D_IN, D_OUT, needs_inner=True) for n in (11, 12)] == [False, True]


@pytest.mark.parametrize(("tokens", "formed"), [(FEW, (0, 0)), (SOME, (0, 1)), (MANY, (1, 1))])
def test_each_pass_takes_the_cheaper_form(tokens: int, formed: tuple[int, int]) -> None:
    layer = make_layer()
    x, _ = inputs(tokens)
    with Shapes() as forward:
        loss = layer(x.requires_grad_()).sum()
    with Shapes() as backward:
        loss.backward()
    assert (forward.weights, backward.weights) == formed


def test_without_gradients_fewer_tokens_are_enough() -> None:
    layer = make_layer()
    x, _ = inputs(SOME)
    with torch.no_grad(), Shapes() as forward:
        y = layer(x)
    assert forward.weights == 1
    torch.testing.assert_close(y, plain_forward(layer, x))


@pytest.mark.parametrize("tokens", [FEW, SOME, MANY])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "no bias"])
def test_output_and_gradients_are_those_of_the_plain_form(kind: str, residual: bool, tokens: int) -> None:
    layer = make_layer(kind.removeprefix("no bias") or "linear", residual=residual, bias=kind != "no bias")
    x, target = inputs(tokens)
    x, target = x.view(1, tokens, D_IN), target.view(1, tokens, D_OUT)
    found = results(layer, layer, x, target)
    expected = results(layer, lambda x: plain_forward(layer, x), x, target)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [FEW, SOME, MANY])
def test_gradients_are_those_of_finite_differences(tokens: int) -> None:
    made = make_layer(residual=True)
    W, b, A, o, s, B, residual = (
        t.detach().double()
        for t in (made.weight, made.bias, made.A, made.lambda_o, made.lambda_s, made.B, made.residual)
    )
    x, _ = inputs(tokens, torch.float64)
    leaves = [t.requires_grad_() for t in (x, o, s)]
    assert torch.autograd.gradcheck(lambda x, o, s: adapted_linear(x, W, b, A, (o, s, B, residual)), leaves)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_plain_form(dtype: torch.dtype, tokens: int, scale: float) -> None:
    layer = make_layer(dtype=dtype)
    with torch.no_grad():
        layer.lambda_o.mul_(scale)
    x, target = inputs(tokens, dtype)
    exact = layer.weight.double() + layer.delta_weight().double()
    y = x.double() @ exact.T + layer.bias.double()
    truth = [y, target.double() @ exact]
    found = results(layer, layer, x, target)
    plain = results(layer, lambda x: plain_forward(layer, x), x, target)
    for a, b, true in zip(found, plain, truth, strict=False):
        assert a.dtype == dtype
        assert (a - true).norm() <= 1.3 * (b - true).norm() + 1e-6 * true.norm()
    for a, b in zip(found[2:], plain[2:], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_backward_inside_autocast_computes_in_the_type_of_the_forward_pass(tokens: int) -> None:
    layer = make_layer()
    x, target = inputs(tokens)
    expected = results(layer, layer, x, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = x.requires_grad_()
        with torch.autocast("cpu", enabled=False):
            y = layer(x)
        layer.zero_grad()
        (y * target).sum().backward()
    for a, b in zip([y, x.grad, layer.lambda_o.grad, layer.lambda_s.grad], expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_near_float32_and_casts_gradients_back(dtype: torch.dtype, tokens: int) -> None:
    layer = make_layer()
    x, target = inputs(tokens, dtype)  # a product before leaves bfloat16, a norm float32
    expected = results(layer, layer, x.float(), target.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(layer, layer, x, target)
    assert [a.dtype for a in found] == [torch.bfloat16, dtype, torch.float32, torch.float32]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_nothing_but_r_numbers_a_token_is_kept(tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    x, _ = inputs(tokens, dtype)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own] == [(R, tokens)]


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("trained", [(), ("lambda_o",), ("lambda_s",)])
def test_frozen_vectors_get_no_gradient_and_cost_nothing(trained: tuple[str, ...], tokens: int) -> None:
    layer = make_layer()
    for name in ("lambda_o", "lambda_s"):
        getattr(layer, name).requires_grad_(name in trained)
    x, target = inputs(tokens)
    kept: list[Tensor] = []
    x = x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    (y * target).sum().backward()
    assert any(t.shape == (R, tokens) for t in kept) == bool(trained)
    assert {name for name in ("lambda_o", "lambda_s") if getattr(layer, name).grad is not None} == set(trained)
    torch.testing.assert_close(x.grad, target @ (layer.weight + layer.delta_weight()))


def test_the_base_weight_is_never_written() -> None:
    layer = make_layer()
    before, version = layer.weight.clone(), layer.weight._version
    layer(inputs(MANY)[0].requires_grad_()).sum().backward()
    assert torch.equal(layer.weight, before)
    assert layer.weight._version == version


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_inputs_in_another_order_of_memory_and_single_vectors(tokens: int) -> None:
    layer = make_layer()
    x = inputs(2 * tokens)[0].view(2, tokens, D_IN).transpose(0, 1)
    torch.testing.assert_close(layer(x), plain_forward(layer, x))
    torch.testing.assert_close(layer(x[0, 0]), plain_forward(layer, x[0, 0]))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_the_output_may_be_worked_on_in_place(tokens: int) -> None:
    layer = make_layer()
    x, target = (t.view(2, tokens // 2, -1) for t in inputs(tokens))
    found = results(layer, lambda x: layer(x).mul_(2), x, target / 2)[1:]
    for a, b in zip(found, results(layer, layer, x, target)[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_without_tokens() -> None:
    layer = make_layer()
    x = torch.zeros(2, 0, D_IN, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == (2, 0, D_OUT)
    assert torch.equal(layer.lambda_o.grad, torch.zeros(D_OUT))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_it_trains_after_a_pass_in_inference_mode(tokens: int, dropout: float) -> None:
    layer = make_layer(dtype=torch.bfloat16, dropout=dropout)
    x, _ = inputs(tokens, torch.bfloat16)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.lambda_o.grad.abs().min() > 0


def test_bases_that_were_changed_in_place_count() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    x, _ = inputs(MANY, torch.bfloat16)
    layer(x)
    layer.A.zero_()
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_autocast_leaves_float64_alone() -> None:
    layer = make_layer(dtype=torch.float64)
    x, _ = inputs(MANY, torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)


# -- when the base layer is called as a module ------------------------------------------------------------------------


class Computed(Tensor):
    """Stands for a quantised weight: a tensor with products of its own."""


class Halved(GivaLinear):
    def coefficients(self) -> Tensor:
        return super().coefficients() / 2


def test_hooks_of_the_base_layer_run() -> None:
    layer = make_layer()
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda _module, _args, output: seen.append(output) or output + 1)
    x, _ = inputs(MANY)
    y = layer(x)
    assert len(seen) == 1
    torch.testing.assert_close(y, seen[0] + 1 + x @ layer.delta_weight().T)


def test_a_replaced_forward_is_called() -> None:
    layer = make_layer()
    plain = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    x, _ = inputs(MANY)
    torch.testing.assert_close(layer(x), 2 * plain(x) + x @ layer.delta_weight().T)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_is_trained_gets_its_gradient(name: str) -> None:
    layer = make_layer()
    getattr(layer.base_layer, name).requires_grad_(True)
    layer(inputs(MANY)[0]).sum().backward()
    assert getattr(layer.base_layer, name).grad.abs().min() > 0


def test_weights_of_another_tensor_type_are_left_to_themselves() -> None:
    layer = make_layer()
    expected = layer(inputs(MANY)[0])
    weight = layer.weight.detach().as_subclass(Computed)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    with Shapes() as seen:
        y = layer(inputs(MANY)[0])
    assert type(layer.weight) is Computed
    assert seen.weights == 0
    torch.testing.assert_close(y.as_subclass(Tensor), expected)


def test_an_input_of_another_type_is_refused_by_the_base_layer() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        make_layer()(inputs(MANY, torch.bfloat16)[0])


def test_a_subclass_may_have_coefficients_of_its_own() -> None:
    layer = make_layer(layer_class=Halved)
    x, _ = inputs(MANY)
    torch.testing.assert_close(layer(x), plain_forward(layer, x))


@pytest.mark.parametrize(("is_training", "formed"), [(True, 0), (False, 1)])
def test_dropout_is_never_fused_and_eval_mode_is(is_training: bool, formed: int) -> None:
    layer = make_layer(dropout=0.5).train(is_training)
    with Shapes() as seen:
        layer(inputs(MANY)[0])
    assert seen.weights == formed


def test_gradients_of_single_examples_by_torch_func() -> None:
    layer = make_layer()
    x, target = inputs(MANY)
    vectors = {"lambda_o": layer.lambda_o.detach(), "lambda_s": layer.lambda_s.detach()}

    def loss(vectors: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, vectors, (x,)) * target).sum()

    single = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(vectors, x, target)
    _, _, *expected = results(layer, layer, x, target)
    for name, gradient in zip(vectors, expected, strict=True):
        assert len(single[name]) == MANY
        torch.testing.assert_close(single[name].sum(0), gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_the_layer_is_one_graph_for_torch_compile(tokens: int) -> None:
    layer = make_layer(residual=True)
    x, target = inputs(tokens)
    expected = results(layer, layer, x, target)
    torch._dynamo.reset()
    found = results(layer, torch.compile(layer, backend="aot_eager", fullgraph=True), x, target)
    torch._dynamo.reset()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
