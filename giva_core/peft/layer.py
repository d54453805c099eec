"""A linear layer with several GiVA adapters, in PEFT's form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BasesError, NumericsError, ProtocolError
from ..fused import Vectors, coefficients
from ..layer import is_conv1d, is_one_product, linear_shape, one_product, product_dtype
from .config import GivaPeftConfig


class FrozenBuffers(BufferDict):
    """Buffers by adapter name that stay float32, and that adapters go on sharing when the model moves."""

    def __init__(self) -> None:
        super().__init__(persistent=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved: dict[int, Tensor] = {}
        for name, buffer in self._buffers.items():
            if id(buffer) not in moved:
                new = fn(buffer)
                moved[id(buffer)] = new if new.dtype == buffer.dtype else buffer.to(new.device)
            self._buffers[name] = moved[id(buffer)]
        return self


class GivaLayer(BaseTunerLayer):
    """The adapters of one layer: trained `lambda_o (d_out,)`, `lambda_s (r,)`; frozen `A (r, d_in)`, `B (d_out, r)`.

    Raises:
        TargetError: The base layer is not an `nn.Linear` or transformers' `Conv1D`.
    """

    adapter_layer_names = ("giva_lambda_o", "giva_lambda_s")
    other_param_names = ("giva_A", "giva_B", "giva_residual", "giva_dropout")

    # PEFT's, told to type checkers, which would take them for nn.Module's
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        self.base_layer = base_layer
        shape = linear_shape(self.get_base_layer(), name)
        self.in_features, self.out_features = shape.d_in, shape.d_out
        self.giva_lambda_o = nn.ParameterDict()
        self.giva_lambda_s = nn.ParameterDict()
        self.giva_A, self.giva_B, self.giva_residual = FrozenBuffers(), FrozenBuffers(), FrozenBuffers()
        self.giva_dropout = nn.ModuleDict()
        self.waiting: set[str] = set()
        self.merged_adapters = []
        self._disable_adapters = False

    def update_layer(
        self, adapter_name: str, A: Tensor, B: Tensor, config: GivaPeftConfig, *, waiting: bool = False
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            A: `(r, d_in)`.
            B: `(d_out, r)`.
            config: Its settings.
            waiting: A and B have no values yet; they come with the adapter's weights.
        """
        device = self.weight.device
        self.giva_A[adapter_name], self.giva_B[adapter_name] = A.to(device), B.to(device)
        self.giva_lambda_o[adapter_name] = nn.Parameter(torch.zeros(self.out_features))
        self.giva_lambda_s[adapter_name] = nn.Parameter(torch.ones(B.shape[1]))
        self.giva_dropout[adapter_name] = nn.Dropout(config.giva_dropout) if config.giva_dropout else nn.Identity()
        if config.residual:
            self.giva_residual[adapter_name] = torch.zeros(B.shape, device=device)
        if not config.init_weights:
            nn.init.normal_(self.giva_lambda_o[adapter_name])
        if waiting:
            self.waiting.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def coefficients(self, adapter: str) -> Tensor:
        """`M = (lambda_o lambda_sᵀ + R) ∘ B (d_out, r)`, so that ΔW = M A; raises as `vectors`."""
        return coefficients(*self.vectors(adapter))

    def vectors(self, adapter: str) -> Vectors:
        """lambda_o, lambda_s, B and R of an adapter.

        Raises:
            BasesError: The adapter waits for its weights.
        """
        if self.waiting and adapter in self.waiting:
            raise BasesError(
                f"adapter '{adapter}' has no bases yet",
                cause="settings of a saved adapter without its weights",
                remedy="load it with PeftModel.from_pretrained, or give GivaPeftConfig its bases",
            )
        residual = self.giva_residual[adapter] if adapter in self.giva_residual else None  # noqa: SIM401  (no dict)
        return self.giva_lambda_o[adapter], self.giva_lambda_s[adapter], self.giva_B[adapter], residual

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter, float32, in the layout of the base weight."""
        delta = self.coefficients(adapter).float() @ self.giva_A[adapter]
        return delta.T if is_conv1d(self.get_base_layer()) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """ΔW is added to the weight and of low rank, so PEFT can convert it."""
        return True

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the layer."""
        self.waiting.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device of the base layer, but not to its type: vectors and bases stay float32."""
        device = device or self.weight.device
        for holder in (self.giva_lambda_o, self.giva_lambda_s, self.giva_A, self.giva_B, self.giva_residual):
            if adapter_name in holder and holder[adapter_name].device.type != "meta":
                holder[adapter_name] = holder[adapter_name].to(device)


class Linear(nn.Module, GivaLayer):
    """`nn.Linear` or `Conv1D` with GiVA adapters: `y = base(x) + Σ (dropout(x) Aᵀ) Mᵀ` over the active ones."""

    def __init__(self, base_layer: nn.Module, name: str, adapter_name: str) -> None:
        nn.Module.__init__(self)
        GivaLayer.__init__(self, base_layer, name)
        self._active_adapter = adapter_name

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The layer's output; with `adapter_names`, example i goes through adapter `adapter_names[i]`."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, adapter_names, self.base_layer(x, *args, **kwargs))
        active = [name for name in self.active_adapters if name in self.giva_lambda_o and not self.merged]
        is_plain = len(active) == 1 and not args and not kwargs
        if is_plain and is_one_product(self.base_layer, self.giva_dropout[active[0]], x):
            return one_product(self.base_layer, x, self.giva_A[active[0]], self.vectors(active[0]))
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in active:
            y = y + self._delta(x, adapter).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given adapters to the base weight, in float32, rounded once each.

        Args:
            safe_merge: Check that the sum is finite before the weight changes.
            adapter_names: The adapters; the active ones without.

        Raises:
            NumericsError: The sum is not finite, under `safe_merge`.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.giva_lambda_o:
                self._add(self.get_delta_weight(adapter), safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract what was merged; equal to the weight before up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add(-self.get_delta_weight(self.merged_adapters.pop()), safe=False)

    def _delta(self, x: Tensor, adapter: str) -> Tensor:
        dtype = product_dtype(x)
        h = F.linear(self.giva_dropout[adapter](x), self.giva_A[adapter].to(dtype))
        return F.linear(h, self.coefficients(adapter).to(dtype))

    def _mixed(self, x: Tensor, names: Sequence[str], y: Tensor) -> Tensor:
        if len(names) != x.shape[0] or self.merged:
            raise ProtocolError(
                "the examples cannot go through an adapter each",
                got="merged adapters" if self.merged else f"{len(names)} adapter_names for {x.shape[0]} examples",
                expected="unmerged adapters and one name for each example",
            )
        y = y.clone()
        for adapter in dict.fromkeys(names):
            if adapter in self.giva_lambda_o:
                index = [row for row, name in enumerate(names) if name == adapter]
                y[index] += self._delta(x[index], adapter).to(y.dtype)
        return y

    def _add(self, delta: Tensor, safe: bool) -> None:
        weight = self.get_base_layer().weight
        merged = (weight.data + delta).to(weight.dtype)
        if safe and not bool(torch.isfinite(merged).all()):
            raise NumericsError("the merged weight is not finite", cause=f"vectors too large for {weight.dtype}")
        weight.data = merged

    def __repr__(self) -> str:
        return "giva." + super().__repr__()
