"""All weights are trained and averaged: federated averaging as it began (McMahan et al., arXiv:1602.05629).

Every round carries the whole model both ways; the byte counts say so. A tied weight is trained, sent and averaged once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def names(model: nn.Module, heads: Collection[str]) -> tuple[str, ...]:
    """Every parameter and stored floating buffer outside the heads, in model order."""
    inside = tuple(f"{head}." for head in heads)
    stored = model.state_dict(keep_vars=True)
    buffers = [name for name, _ in model.named_buffers() if name in stored and stored[name].is_floating_point()]
    found = [*(name for name, _ in model.named_parameters()), *buffers]
    return tuple(name for name in found if not name.startswith(inside))
