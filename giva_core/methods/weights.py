"""The frozen weights of a model's layers as matrices, and bases as what a site froze."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import Arrays, BasesSet, LayerShape

if TYPE_CHECKING:
    from torch import nn


def read_weights(model: nn.Module, layers: Sequence[LayerShape]) -> dict[str, np.ndarray]:
    """W `(d_out, d_in)` of every layer, float32."""
    from ..layer import is_conv1d

    found = {}
    for layer in layers:
        module: Any = model.get_submodule(layer.name)
        weight = module.weight.detach().float().cpu()
        found[layer.name] = (weight.T if is_conv1d(module) else weight).numpy()
    return found


def weights_frozen(made: BasesSet) -> Arrays:
    """A and B of every layer by name, as `Prepared.frozen` has them."""
    return {f"{name}.{letter}": getattr(pair, letter) for name, pair in made.layers.items() for letter in ("A", "B")}
