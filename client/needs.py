"""What training needs beyond the base installation: the extra `site`."""

from __future__ import annotations

from importlib.util import find_spec

from giva_core.errors import DependencyError

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
