"""What training needs beyond the base installation: the extra `site`, and for some methods PEFT."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from giva_core.errors import DependencyError
from giva_core.method_config import PEFT_METHODS

_PACKAGES = ("torch", "transformers", "tqdm")


def require_training() -> None:
    """Make sure that a model can be trained here, without importing anything.

    Raises:
        DependencyError: The extra `site` is not installed.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise DependencyError(
            "training needs what is not installed here",
            got=f"no {' and no '.join(missing)}",
            cause="fedgiva was installed without its extra `site`, as a server needs it",
            remedy="pip install 'fedgiva[site]'",
            public="what training needs is not installed",
        )


def require_methods(methods: Iterable[str]) -> None:
    """Make sure that the packages of these methods are here, without importing them.

    Raises:
        DependencyError: PEFT is not installed, and one of the methods is made of its layers.
    """
    needing = [method for method in methods if method in PEFT_METHODS]
    if needing and find_spec("peft") is None:
        raise DependencyError(
            f"{', '.join(needing)} {'needs' if len(needing) == 1 else 'need'} PEFT, which is not installed here",
            remedy="pip install 'fedgiva[peft]'; for a container, build its image with EXTRAS=peft",
            public="PEFT not installed",
        )
