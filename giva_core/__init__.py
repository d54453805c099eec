"""GiVA as a library: gradient-informed bases, two trained vectors per layer, and their federation.

Gangwar et al., "GiVA: Gradient-Informed Bases for Vector-Based Adaptation", arXiv:2604.21901. This package knows the
method and nothing of Flower: the packages `server` and `client` put it on the wire.

The names below are the public door. Each is loaded on first use (PEP 562), so `import giva_core` needs neither torch
nor time; whatever is not listed may change without notice. The function `giva_core.inject.inject` goes by the name
`inject_adapters` here, because `giva_core.inject` is the module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapt import calibrate
    from .adapter_bank import AdapterBank
    from .bases import build_bases
    from .checkpoint import load_adapter, save_adapter
    from .config import GivaConfig, RunConfig
    from .errors import GivaError
    from .inject import (
        adapter_disabled,
        merge,
        read_state,
        read_vectors,
        unmerge,
        write_state,
        write_vectors,
    )
    from .inject import inject as inject_adapters
    from .layer import GivaLinear
    from .sketch import sketch_pass
    from .targets import find_targets

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "GivaConfig",
    "GivaError",
    "GivaLinear",
    "RunConfig",
    "adapter_disabled",
    "build_bases",
    "calibrate",
    "find_targets",
    "inject_adapters",
    "load_adapter",
    "merge",
    "read_state",
    "read_vectors",
    "save_adapter",
    "sketch_pass",
    "unmerge",
    "write_state",
    "write_vectors",
]

#: Public name -> (module, name in that module).
_DOOR = {
    "AdapterBank": ("adapter_bank", "AdapterBank"),
    "GivaConfig": ("config", "GivaConfig"),
    "GivaError": ("errors", "GivaError"),
    "GivaLinear": ("layer", "GivaLinear"),
    "RunConfig": ("config", "RunConfig"),
    "adapter_disabled": ("inject", "adapter_disabled"),
    "build_bases": ("bases", "build_bases"),
    "calibrate": ("adapt", "calibrate"),
    "find_targets": ("targets", "find_targets"),
    "inject_adapters": ("inject", "inject"),
    "load_adapter": ("checkpoint", "load_adapter"),
    "merge": ("inject", "merge"),
    "read_state": ("inject", "read_state"),
    "read_vectors": ("inject", "read_vectors"),
    "save_adapter": ("checkpoint", "save_adapter"),
    "sketch_pass": ("sketch", "sketch_pass"),
    "unmerge": ("inject", "unmerge"),
    "write_state": ("inject", "write_state"),
    "write_vectors": ("inject", "write_vectors"),
}


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module 'giva_core' has no attribute '{name}'")
    module, attribute = _DOOR[name]
    value = getattr(importlib.import_module(f"giva_core.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
