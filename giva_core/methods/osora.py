"""OSoRA: the singular values of the weight and one scale for each output are trained, its singular vectors frozen.

    W' = (W − U_r diag(S_r) V_rᵀ) + diag(o) U_r diag(s) V_rᵀ,    o (d_out,) = 1, s (r,) = S_r at the start

Han, Zhang and Zhang, "OSoRA: Output-Dimension and Singular-Value Initialized Low-Rank Adaptation", arXiv:2505.14350.
With `A = V_rᵀ`, `B = U_r` it is GiVA's layer with a frozen residual, `M = (o sᵀ − 1 S_rᵀ) ∘ U_r`: the weight is not
touched, and at the start `M` is exactly 0. The singular vectors come from exact arithmetic (`weight_bases`), not from
LAPACK, so that every site has the same; nothing of them travels. ΔW is bilinear in o and s, as GiVA's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..config import RunConfig
from ..types import Arrays, LayerShape
from .weights import read_weights, weights_frozen

if TYPE_CHECKING:
    from torch import nn


def put_in(
    model: nn.Module, layers: Sequence[LayerShape], ranks: Sequence[int], config: RunConfig
) -> tuple[tuple[str, ...], Arrays]:
    """Put OSoRA layers of rank `giva.rank` into `model`, in place; result as of `lora.put_in`.

    Raises:
        BasesError: A weight has a lower rank.
    """
    import torch

    from .. import inject
    from .weight_bases import weight_bases

    made, values = weight_bases(layers, ranks, read_weights(model, layers), config.giva.seed)
    inject.inject(model, made, config.giva.dropout)
    start = {}
    for layer in layers:
        start[f"{layer.name}.lambda_o"] = np.ones(layer.d_out, np.float32)
        start[f"{layer.name}.lambda_s"] = values[layer.name]
    inject.write_vectors(model, start)
    for name, adapted in inject.adapted_layers(model).items():
        adapted.residual = -torch.from_numpy(values[name]).expand(adapted.out_features, -1).clone().to(adapted.B.device)
    return tuple(start), weights_frozen(made)
