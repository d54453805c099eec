"""The adapted linear layer as one autograd function: each pass takes the cheaper of two equal forms.

With `ΔW = M A`, `M (d_out, r)` and `A (r, d_in)` (arXiv:2604.21901), the products of the layer are either

    folded   y = x Wᵀ + (x Aᵀ) Mᵀ      ∂L/∂x = δ W + (δ M) A
    fused    y = x (W + M A)ᵀ          ∂L/∂x = δ (W + M A)

and the gradient of the vectors is that of `∂L/∂M = δᵀ (x Aᵀ)` in both. What is kept for the backward pass is `x Aᵀ`
alone, r numbers a token; M and `W + M A` are formed again there, since keeping them would cost a second model. All
of this is ours; the paper writes the scales out, token by token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: `lambda_o (d_out,)`, `lambda_s (r,)`, `B (d_out, r)`, and `R (d_out, r)` or None.
Vectors = tuple[Tensor, Tensor, Tensor, Tensor | None]


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    vectors: Vectors,
    *,
    is_transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`x (W + M A)ᵀ + b` with gradients for x and the vectors.

    Args:
        x: `(..., d_in)`.
        weight: W, frozen, `(d_out, d_in)`.
        bias: b, frozen, `(d_out,)` or None.
        A: `(r, d_in)`.
        vectors: lambda_o, lambda_s, B and R, float32.
        is_transposed: W is stored as `(d_in, d_out)`.
        dtype: Type of the products and of y; that of A without.

    Returns:
        y `(..., d_out)`.
    """
    lambda_o, lambda_s, *_ = vectors
    trains = torch.is_grad_enabled() and (lambda_o.requires_grad or lambda_s.requires_grad)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _AdaptedLinear.apply(rows, weight, bias, A, *vectors, is_transposed, trains, dtype or A.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def coefficients(lambda_o: Tensor, lambda_s: Tensor, B: Tensor, residual: Tensor | None) -> Tensor:
    """`M = (lambda_o lambda_sᵀ + R) ∘ B`, `(d_out, r)`."""
    if residual is None:
        return lambda_o[:, None] * B * lambda_s
    return (lambda_o[:, None] * lambda_s + residual) * B


def is_fused_cheaper(tokens: int, d_in: int, d_out: int, *, needs_inner: bool = False) -> bool:
    """Whether forming `W + M A` takes fewer products than the adapter's own pass over the tokens.

    Both cost r each: `d_in · d_out` against `tokens · (d_in + d_out)`, or `tokens · d_out` where `x Aᵀ` is needed in
    any case, as in a forward pass that will be followed by a backward one.
    """
    return tokens * (d_out if needs_inner else d_in + d_out) > d_in * d_out


class _AdaptedLinear(torch.autograd.Function):
    """On matrices `(tokens, d_in)`: a view made inside could not be worked on in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        lambda_o: Tensor,
        lambda_s: Tensor,
        B: Tensor,
        residual: Tensor | None,
        is_transposed: bool,
        trains: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        with _no_autocast(x.device.type):
            rows = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            d_out, d_in = B.shape[0], A.shape[1]
            fuse = is_fused_cheaper(len(rows), d_in, d_out, needs_inner=trains)
            M = coefficients(lambda_o, lambda_s, B, residual)
            # (r, tokens): a third faster on a CPU than its transpose
            h = A.to(dtype) @ rows.T if trains or not fuse else None
            if h is None or fuse:
                y = F.linear(rows, _adapted_weight(weight, M, A, dtype, is_transposed), bias)
            else:
                W = weight.to(dtype)
                y = F.linear(rows, W.T if is_transposed else W, bias).addmm_(h.T, M.to(dtype).T)
            ctx.save_for_backward(h if trains else None, weight, A, lambda_o, lambda_s, B, residual)
            ctx.x_dtype, ctx.is_transposed = x.dtype, is_transposed
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, A, lambda_o, lambda_s, B, residual = ctx.saved_tensors
        x_needs, o_needs, s_needs = (ctx.needs_input_grad[i] for i in (0, 4, 5))
        grad_x = grad_o = grad_s = None
        with _no_autocast(delta.device.type):
            d_out, d_in = B.shape[0], A.shape[1]
            if x_needs:
                M = coefficients(lambda_o, lambda_s, B, residual)
                if is_fused_cheaper(len(delta), d_in, d_out):
                    W = _adapted_weight(weight, M, A, delta.dtype, ctx.is_transposed)
                    grad_x = delta @ W
                else:
                    W = weight.to(delta.dtype)
                    grad_x = delta @ (W.T if ctx.is_transposed else W)
                    grad_x.addmm_(delta @ M.to(delta.dtype), A.to(delta.dtype))
                grad_x = grad_x.to(ctx.x_dtype)
            if o_needs or s_needs:
                C = (h @ delta).T.to(B.dtype) * B  # the gradient of lambda_o lambda_sᵀ
                grad_o = C @ lambda_s.to(C.dtype) if o_needs else None
                grad_s = C.T @ lambda_o.to(C.dtype) if s_needs else None
        return grad_x, None, None, None, grad_o, grad_s, *(None,) * 5


def _adapted_weight(weight: Tensor, M: Tensor, A: Tensor, to: torch.dtype, is_transposed: bool) -> Tensor:
    """`W + M A (d_out, d_in)` in the type `to`; the sum is float32, or of W's type where that is `to`.

    A product of half-precision matrices is accumulated, W included, in float32 and rounded once.
    """
    W = weight.T if is_transposed else weight
    dtype = torch.promote_types(W.dtype, to)
    return torch.addmm(W.to(dtype), M.to(dtype), A.to(dtype)).to(to)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else nullcontext()
