"""LoRA and its federated forms on PEFT's layers, started identically at every site.

    ΔW = (alpha / r) B A,    A (r, d_in) random, B (d_out, r) zero at the start

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. What a federation makes of it:

- `lora` averages A and B each by itself (FedIT, Zhang et al., arXiv:2305.05644), though `Σ w_k B_k A_k ≠ B̄ Ā`;
- `ffa-lora` freezes A at its start and trains B alone, whose mean is exact (Sun et al., "Improving LoRA in
  Privacy-preserving Federated Learning", arXiv:2403.12313);
- `rolora` trains and averages B in odd rounds and A in even ones, which is exact since the other one is common (Chen et
  al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", arXiv:2502.01755, before that
  arXiv:2409.02346);
- `fedex-lora` averages A and B and adds `Σ w_k B_k A_k − B̄ Ā` to the frozen weight (Singhal, Ponkshe and Vepakomma,
  arXiv:2410.09432); the arithmetic is in `factored`.

PEFT draws A from torch's generator, whose normals differ between machines in the last bits; here A is redrawn from the
shared seed, with the same distribution, U(−1/√d_in, 1/√d_in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import exact
from ..config import RunConfig
from ..factored import DENSE, FACTOR_A, FACTOR_B, is_residual
from ..layer import is_conv1d
from ..types import Arrays, LayerShape
from .peft_layers import put_in_peft

if TYPE_CHECKING:
    from torch import Tensor, nn


def put_in(
    model: nn.Module, layers: Sequence[LayerShape], ranks: Sequence[int], config: RunConfig
) -> tuple[tuple[str, ...], Arrays]:
    """Put PEFT's LoRA layers into `model`, in place.

    Args:
        model: The model, its other parameters already frozen.
        layers: The layers to adapt.
        ranks: Not used: LoRA's rank is `lora.rank` in every layer.
        config: The run; `lora.rank`, `lora.alpha`, `giva.dropout` and `giva.seed` are read.

    Returns:
        Names of the trained arrays, and what is frozen besides the model: A under `ffa-lora`.

    Raises:
        DependencyError: PEFT is not installed.
    """
    import torch

    names = put_in_peft(
        model,
        config.method,
        "Lora",
        layers,
        ("lora_A", "lora_B"),
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.giva.dropout,
        bias="none",
    )
    parameters = dict(model.named_parameters())
    frozen: Arrays = {}
    for name in names:
        if ".lora_A." in name:
            parameter = parameters[name]
            start = exact.uniform(config.giva.seed, f"lora.{name}", tuple(parameter.shape))
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(start) / math.sqrt(parameter.shape[1]))
            if config.method == "ffa-lora":
                parameter.requires_grad_(False)
                frozen[name] = parameter.detach().to("cpu", torch.float32, copy=True).numpy()
    return tuple(name for name in names if name not in frozen), frozen


def add_residual(model: nn.Module, arrays: Mapping[str, np.ndarray], kept: dict[str, Tensor]) -> None:
    """Set every adapted weight to `W + residual`; without a residual for it, back to W.

    Args:
        model: A model with LoRA layers.
        arrays: The global arrays, fedex-lora's residuals among them.
        kept: W of every layer that was changed, by layer name; filled here, and to be handed in again.
    """
    import torch

    residuals: dict[str, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        if is_residual(name):
            layer, _, kind = name.rpartition(".")
            residuals.setdefault(layer, {})[kind] = torch.from_numpy(np.ascontiguousarray(array))
    for layer in {**residuals, **kept}:
        adapted: Any = model.get_submodule(layer)
        weight: Tensor = adapted.base_layer.weight
        if layer not in kept:
            kept[layer] = weight.detach().clone()
        with torch.no_grad():
            parts = residuals.get(layer)
            if not parts:
                weight.copy_(kept[layer])
                continue
            added = parts[DENSE] if DENSE in parts else parts[FACTOR_B] @ parts[FACTOR_A]
            if is_conv1d(adapted.base_layer):  # it holds its weight transposed
                added = added.T
            weight.copy_(kept[layer] + added.to(weight.device))
