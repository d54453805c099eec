"""What the methods that PEFT has share: putting its layers in, and redrawing what they freeze from the shared seed.

PEFT draws from torch's generator, whose numbers are not the same on every machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import exact
from ..errors import DependencyError
from ..types import Arrays, LayerShape

if TYPE_CHECKING:
    from torch import nn


def put_in_peft(
    model: nn.Module, method: str, kind: str, layers: Sequence[LayerShape], marks: Sequence[str], **options: Any
) -> tuple[str, ...]:
    """Put PEFT's layers of one kind into `model`, in place, the trained parameters in float32.

    Args:
        model: The model, its other parameters already frozen.
        method: The run's method, for the error.
        kind: What PEFT's configuration and model classes begin with.
        layers: The layers to adapt.
        marks: What a trained parameter's name has among its parts.
        options: The configuration's own settings.

    Returns:
        Names of the trained parameters, in model order.

    Raises:
        DependencyError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            f"method = {method} needs PEFT",
            got=error,
            remedy="pip install 'fedgiva[peft]', or build the site's image with EXTRAS=peft",
            public="PEFT not installed",
        ) from None
    settings = getattr(peft, f"{kind}Config")(target_modules=[layer.name for layer in layers], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D's orientation, which PEFT finds out by itself
        # inject_adapter_in_model does no more, and refuses the methods whose layers share matrices
        getattr(peft, f"{kind}Model")(model, settings, "default")
    names = []
    for name, parameter in model.named_parameters():
        if any(mark in name.split(".") for mark in marks):
            parameter.data = parameter.data.float()
            names.append(name)
    return tuple(names)


def redraw_shared(layer: Any, kind: str, seed: int, bound: Callable[[tuple[int, ...]], float]) -> Arrays:
    """Draw the two frozen matrices that all layers share anew, in place, from `U(-bound, bound)`.

    Args:
        layer: One of PEFT's layers; every layer holds the same two.
        kind: What the matrices' names begin with: `<kind>_A` and `<kind>_B`, which are the streams of the draws too.
        seed: The shared seed.
        bound: The largest number, by the matrix's shape.

    Returns:
        The matrices by name, float32.
    """
    import torch

    frozen: Arrays = {}
    for name in (f"{kind}_A", f"{kind}_B"):
        matrix = getattr(layer, name)["default"]
        shape = tuple(matrix.shape)
        frozen[name] = exact.uniform(seed, name, shape) * np.float32(bound(shape))
        with torch.no_grad():
            matrix.copy_(torch.from_numpy(frozen[name]))
    return frozen
