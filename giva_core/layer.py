"""One adapted linear layer.

Gangwar et al., "GiVA: Gradient-Informed Bases for Vector-Based Adaptation", arXiv:2604.21901. We differ in two things:
both scales are folded into one small matrix per forward, so that no `(tokens, d_out)` tensor is kept for the backward
pass, and a frozen residual of coefficients may be added, which keeps the exact mean of several sites' products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .errors import BasesError, NumericsError, TargetError
from .fused import Vectors, adapted_linear, coefficients
from .types import LayerShape


class GivaLinear(nn.Module):
    """A frozen linear layer plus the adapter `ΔW = diag(lambda_o) · B · diag(lambda_s) · A`.

    Forward, with the scales folded into `M = (lambda_o lambda_sᵀ + R) ∘ B` of shape `(d_out, r)`:

        y = base(x) + (dropout(x) Aᵀ) Mᵀ        x (..., d_in) → y (..., d_out)

    `A` needs no gradient, so x is not kept for it; what the adapter keeps per token is the r numbers of `x Aᵀ`. The
    vectors start at `lambda_o = 0`, `lambda_s = 1`, where ΔW is exactly 0. Bases and vectors stay float32 whatever
    the type of the base weight, also when the model is cast; products run in the type of x (or of autocast).

    Attributes:
        base_layer: The frozen layer, an `nn.Linear` or transformers' `Conv1D`.
        lambda_o: Trained, float32 `(d_out,)`.
        lambda_s: Trained, float32 `(r,)`.
        A: Frozen, float32 `(r, d_in)`.
        B: Frozen, float32 `(d_out, r)`.
        residual: R, frozen, float32 `(d_out, r)`; None for zero.
        enabled: False makes the layer compute `base(x)` alone.

    Args:
        base_layer: The layer to adapt; it is frozen by `inject`, not here.
        A: `(r, d_in)`.
        B: `(d_out, r)`.
        dropout: Dropout on the adapter's input, while training.

    Raises:
        TargetError: `base_layer` is not a linear layer.
        BasesError: A or B does not fit it.

    Source: arXiv:2604.21901; the folded form, the residual and `merge` are ours.
    """

    #: Names of what is trained; a layer of the same bases may train something else between them.
    vectors: ClassVar[tuple[str, ...]] = ("lambda_o", "lambda_s")

    lambda_o: nn.Parameter
    lambda_s: nn.Parameter
    A: Tensor
    B: Tensor
    residual: Tensor | None

    def __init__(self, base_layer: nn.Module, A: np.ndarray, B: np.ndarray, dropout: float = 0.0) -> None:
        super().__init__()
        check_bases(linear_shape(base_layer, "base_layer"), A, B)
        self.base_layer = base_layer
        device = self.weight.device
        self.register_buffer("A", torch.tensor(A, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("B", torch.tensor(B, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("residual", None, persistent=False)
        self._start()
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.enabled = True
        self._unmerged_weight: Tensor | None = None
        self.train(base_layer.training)

    def _start(self) -> None:
        """Make what is trained, such that ΔW = 0."""
        d_out, r = self.B.shape
        self.lambda_o = nn.Parameter(torch.zeros(d_out, device=self.B.device, dtype=torch.float32))
        self.lambda_s = nn.Parameter(torch.ones(r, device=self.B.device, dtype=torch.float32))

    # Models look at these on what they believe to be a plain linear layer (T5 asks for `wo.weight.dtype`).

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight, in the base layer's layout."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """d_in."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.B.shape[0]

    @property
    def rank(self) -> int:
        """The effective rank r."""
        return self.A.shape[0]

    @property
    def merged(self) -> bool:
        """Whether ΔW is written into the base weight at present."""
        return self._unmerged_weight is not None

    def forward(self, input: Tensor) -> Tensor:  # the name nn.Linear gives it, for callers by keyword
        """`base(x) + (dropout(x) Aᵀ) Mᵀ`; `base(x)` alone where merged or not enabled."""
        if self.merged or not self.enabled:
            return self.base_layer(input)
        if type(self).coefficients is GivaLinear.coefficients and is_one_product(self.base_layer, self.dropout, input):
            return one_product(self.base_layer, input, self.A, (self.lambda_o, self.lambda_s, self.B, self.residual))
        dtype = product_dtype(input)
        y = self.base_layer(input)
        h = F.linear(self.dropout(input), self.A.to(dtype))  # (..., r)
        return y + F.linear(h, self.coefficients().to(dtype))

    def coefficients(self) -> Tensor:
        """`M = (lambda_o lambda_sᵀ + R) ∘ B`, float32 `(d_out, r)`, so that ΔW = M A."""
        return coefficients(self.lambda_o, self.lambda_s, self.B, self.residual)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """`ΔW = M A`, float32, in the layout of the base weight: `(d_out, d_in)`, or `(d_in, d_out)` for `Conv1D`."""
        with torch.autocast(self.A.device.type, enabled=False):
            delta = self.coefficients() @ self.A
        return delta.T if is_conv1d(self.base_layer) else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Write `W + ΔW` into the base weight, added in float32; a copy of W is kept for `unmerge`.

        Raises:
            NumericsError: The sum is not finite in the type of W; the weight is left as it was.
        """
        if self.merged:
            return
        merged = (self.weight + self.delta_weight()).to(self.weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise NumericsError("the merged weight is not finite", cause=f"vectors too large for {self.weight.dtype}")
        self._unmerged_weight = self.weight.detach().clone()
        self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept copy of W back: bit for bit the weight before `merge`."""
        if self._unmerged_weight is not None:
            self.weight.copy_(self._unmerged_weight)
            self._unmerged_weight = None

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"d_out={self.out_features}, d_in={self.in_features}, r={self.rank}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model, but stay float32: `model.bfloat16()` casts the base layer alone."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            self.base_layer._apply(fn)
        return super()._apply(keep_type, recurse=False)


# -- linear layers ----------------------------------------------------------------------------------------------------


def unwrap(module: nn.Module) -> nn.Module:
    """The base layer of a `GivaLinear`; any other module itself."""
    return module.base_layer if isinstance(module, GivaLinear) else module


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`: a linear layer whose weight is `(d_in, d_out)`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling it is a product with its weight and no more: no hook, no forward or tensor type of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    is_linear = type(module).forward is nn.Linear.forward or is_conv1d(module)
    return is_linear and "forward" not in vars(module) and not any(hooks) and type(module.weight) is nn.Parameter


def is_adaptable(module: nn.Module) -> bool:
    """Whether `module` (or what it wraps) is a linear layer that can be adapted.

    Not so: subclasses with a forward of their own (quantised or masked layers), layers whose weight is no parameter
    (weight normalisation), and the output projection inside `nn.MultiheadAttention`, whose weight is used without a
    call of the layer.
    """
    module = unwrap(module)
    if not is_conv1d(module) and (
        not isinstance(module, nn.Linear)
        or isinstance(module, NonDynamicallyQuantizableLinear)
        or type(module).forward is not nn.Linear.forward
    ):
        return False
    weight = module._parameters.get("weight")  # a parametrised one is computed anew from others: nothing can be merged
    return weight is not None and weight.ndim == 2 and weight.is_floating_point()


def linear_shape(module: nn.Module, name: str) -> LayerShape:
    """The shape of a linear layer, wrapped or not.

    Raises:
        TargetError: It is not a layer that can be adapted.
    """
    module = unwrap(module)
    if not is_adaptable(module):
        raise TargetError(
            f"'{name}' cannot be adapted",
            got=type(module).__name__,
            expected="nn.Linear or transformers' Conv1D",
            cause="the target matches a container or another kind of layer",
            remedy="name linear layers in giva.target-modules",
        )
    rows, columns = module.weight.shape  # type: ignore[misc]
    return LayerShape(name, columns, rows) if is_conv1d(module) else LayerShape(name, rows, columns)


def check_bases(shape: LayerShape, A: np.ndarray, B: np.ndarray) -> None:
    """Refuse bases that do not fit a layer.

    Args:
        shape: The layer.
        A: Expected `(r, d_in)`.
        B: Expected `(d_out, r)`.

    Raises:
        BasesError: Wrong shape, or numbers that are not finite.
    """
    fits = A.ndim == 2 and B.ndim == 2 and A.shape[0] == B.shape[1] >= 1
    if not fits or A.shape[1] != shape.d_in or B.shape[0] != shape.d_out:
        raise BasesError(
            f"the bases of '{shape.name}' do not fit the layer",
            got=f"A {tuple(A.shape)}, B {tuple(B.shape)}",
            expected=f"A (r, {shape.d_in}), B ({shape.d_out}, r)",
            cause="bases of another model, or A and B exchanged",
            remedy="build the bases from this model's sketches",
        )
    for letter, matrix in (("A", A), ("B", B)):
        if not np.isfinite(matrix).all():
            raise BasesError(f"{letter} of '{shape.name}' has entries that are not finite", cause="a damaged file")


# -- base layer and adapter together ----------------------------------------------------------------------------------


def is_one_product(base: nn.Module, dropout: nn.Module, x: Tensor) -> bool:
    """Whether base layer and adapter may be computed as one: the base is frozen and plain, nothing is dropped.

    Otherwise the base layer is called as the module that it is. The function of `fused` has no rule for `torch.func`,
    under which PyTorch's own products are used, and no second derivative: asking for one is an error.
    """
    return (
        is_plain_linear(base)
        and (_is_autocast(x) or x.dtype == base.weight.dtype)
        and not any(parameter.requires_grad for parameter in base.parameters(recurse=False))
        and not (isinstance(dropout, nn.Dropout) and dropout.training)
        and not torch._C._are_functorch_transforms_active()
    )


def one_product(base: nn.Module, x: Tensor, A: Tensor, vectors: Vectors) -> Tensor:
    """`x (W + M A)ᵀ + b` of a base layer that `is_one_product`; see `fused.adapted_linear`."""
    weight: Any = base.weight
    bias: Any = base.bias
    return adapted_linear(x, weight, bias, A, vectors, is_transposed=is_conv1d(base), dtype=product_dtype(x))


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that products with x are computed in: autocast's, or that of x."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def _is_autocast(x: Tensor) -> bool:
    """Whether autocast is on; it leaves float64 alone."""
    kind = x.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return is_on and x.dtype != torch.float64
