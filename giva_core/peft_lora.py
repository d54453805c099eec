"""The LoRA baseline on PEFT's own layers, started identically at every site.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685: ΔW = (alpha / r) B A with A
`(r, d_in)` random and B `(d_out, r)` zero. PEFT draws A from torch's generator, whose normals differ between machines
in the last bits; here A is redrawn from the shared seed, with the same distribution, U(−1/√d_in, 1/√d_in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import exact
from .config import RunConfig
from .errors import DependencyError
from .types import LayerShape

if TYPE_CHECKING:
    from torch import nn


def inject_lora(model: nn.Module, layers: Sequence[LayerShape], config: RunConfig) -> tuple[str, ...]:
    """Put PEFT's LoRA layers into `model`, in place, and return the names of the trained parameters.

    Args:
        model: The model, its other parameters already frozen.
        layers: The layers to adapt.
        config: The run; `lora.rank`, `lora.alpha`, `giva.dropout` and `giva.seed` are read.

    Raises:
        DependencyError: PEFT is not installed.
    """
    import torch

    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            "method = lora needs PEFT",
            got=error,
            remedy="pip install 'fedgiva[baselines]'",
            public="PEFT not installed",
        ) from None
    settings = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.giva.dropout,
        target_modules=[layer.name for layer in layers],
        bias="none",
    )
    peft.inject_adapter_in_model(settings, model)
    names = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            names.append(name)
            if ".lora_A." in name:
                start = exact.uniform(config.giva.seed, f"lora.{name}", tuple(parameter.shape))
                with torch.no_grad():
                    parameter.copy_(torch.from_numpy(start) / math.sqrt(parameter.shape[1]))
    return tuple(names)
