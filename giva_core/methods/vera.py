"""VeRA on PEFT's layers: one pair of random matrices for all layers, two trained vectors in each.

    ΔW = diag(b) B diag(d) A,    A (r, d_in), B (d_out, r) frozen;  b (d_out,) = 0, d (r,) = 0.1 at the start

Kopiczko, Blankevoort and Asano, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454, equation 2. A and B
are as wide as the widest layer; a narrower one uses their first columns or rows. PEFT draws them from torch's
generator; here they are redrawn from the shared seed with the same distribution (Kaiming uniform, `±√(6/fan_in)`), the
same bytes at every site, and nothing of them travels. ΔW is bilinear in b and d: their mean is not the mean of ΔW.
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
    """Put PEFT's VeRA layers into `model`, in place; arguments, result and errors as of `lora.put_in`."""
    names = put_in_peft(
        model,
        config.method,
        "Vera",
        layers,
        ("vera_lambda_b", "vera_lambda_d"),
        r=config.vera.rank,
        d_initial=config.vera.d_initial,
        vera_dropout=config.giva.dropout,
        save_projection=True,
    )
    layer = model.get_submodule(layers[0].name)
    return names, redraw_shared(layer, "vera", config.giva.seed, lambda shape: math.sqrt(6.0 / shape[1]))
