"""What the methods that PEFT has share: putting its layers in, and asking for PEFT where it is not installed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DependencyError
from ..types import LayerShape

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
