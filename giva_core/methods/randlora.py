"""RandLoRA on PEFT's layers: a full-rank update as a sum of scaled random low-rank products.

    ΔW = (alpha / r) Σ_j B_j diag(lambda_j) A_j diag(gamma_j),   j = 1 … n,   n = ⌈min(d_out, d_in) / r⌉

with `A_j` and `B_j` random and frozen, `lambda_j (r,)` and `gamma_j (min(d_out, d_in),)` trained. Albert et al.,
"RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv:2502.00987, section 4. As in PEFT, A is
one matrix for all j, on the smaller side, and A and B are shared by all layers. At the start `lambda = 0` and
`gamma = 1 / max(n, min(d_out, d_in))`.

PEFT draws A and B from torch's generator and divides them by their standard deviation, a float sum whose last bits
differ between machines. Here they are uniform numbers of variance one, `√3 · U(−1, 1)`, from the shared seed, the same
bytes at every site. ΔW is bilinear in lambda and gamma: their mean is not the mean of ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config import RunConfig
from ..types import Arrays, LayerShape
from .peft_layers import put_in_peft, redraw_shared

if TYPE_CHECKING:
    from torch import nn


def put_in(
    model: nn.Module, layers: Sequence[LayerShape], ranks: Sequence[int], config: RunConfig
) -> tuple[tuple[str, ...], Arrays]:
    """Put PEFT's RandLoRA layers into `model`, in place; arguments, result and errors as of `lora.put_in`."""
    names = put_in_peft(
        model,
        config.method,
        "RandLora",
        layers,
        ("randlora_lambda", "randlora_gamma"),
        r=config.randlora.rank,
        randlora_alpha=config.randlora.alpha,
        randlora_dropout=config.giva.dropout,
        save_projection=True,
    )
    layer = model.get_submodule(layers[0].name)
    return names, redraw_shared(layer, "randlora", config.giva.seed, lambda shape: math.sqrt(3.0))
