"""What can be trained beside the head, by one word: `method`. A module each, with the definition and its source.

A method puts its layers into the model and says which arrays are trained. All else is common: the local loop, the
wire, the byte counts, the averages, the checkpoints. What a site freezes by itself comes from the shared seed or from
the model's weights by exact arithmetic, and a digest of it stands beside that of the weights in the site's hello, so
that sites that froze something else are turned away. Bases of the federation's gradient are agreed on as `giva`'s are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

from ..config import LORA_FAMILY, RunConfig
from ..types import Arrays, LayerShape

if TYPE_CHECKING:
    from torch import nn

    from ..layer import GivaLinear


@dataclass(frozen=True)
class Prepared:
    """What a method found in a model, or put into it.

    Attributes:
        layers: The layers that get bases of the federation's gradient; empty for methods without.
        ranks: The effective rank of each of them.
        form: What is trained between the bases, as in `ModelSchema`.
        trained: Names of the arrays that are trained beside the head from the start.
        frozen: What the method froze by itself, by name.
    """

    layers: tuple[LayerShape, ...] = ()
    ranks: tuple[int, ...] = ()
    form: str = "vectors"
    trained: tuple[str, ...] = ()
    frozen: Arrays = field(default_factory=dict)


def prepare(model: nn.Module, config: RunConfig, heads: Collection[str]) -> Prepared:
    """Find the layers to adapt, and put in, in place, what needs no calibration.

    Args:
        model: The frozen model.
        config: The run.
        heads: Modules that are trained whole; they are never adapted.

    Raises:
        TargetError: Nothing to adapt, or a rank above every layer's.
        DependencyError: PEFT is needed and not installed.
        BasesError: A weight has too low a rank for the bases that are made of it.
    """
    from .. import inject

    if config.method == "head":
        return Prepared()
    if config.method == "full":
        from . import full

        return Prepared(trained=full.names(model, heads))
    layers, ranks = inject.layer_shapes(model, config.bases, exclude=heads)
    if config.has_bases:
        return Prepared(layers, ranks, form="core" if config.method == "lora-xs" else "vectors")
    name = "lora" if config.method in LORA_FAMILY else config.method.replace("-", "_")
    trained, frozen = import_module(f".{name}", __name__).put_in(model, layers, ranks, config)
    return Prepared(trained=trained, frozen=frozen)


def layer_kind(config: RunConfig) -> type[GivaLinear]:
    """The adapted layer that stands between bases of the federation's gradient."""
    if config.method == "lora-xs":
        from .lora_xs import CoreLinear

        return CoreLinear
    from ..layer import GivaLinear

    return GivaLinear
