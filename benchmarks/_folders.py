"""The folders that a run's sites lie in: all of a split's, all rows as one site, the first site alone."""

from __future__ import annotations

import contextlib
from pathlib import Path


def sites_of(folder: Path) -> list[Path]:
    """The sites of a split, by name."""
    return sorted(path for path in (folder / "sites").iterdir() if path.is_dir())


def pooled_site(folder: Path) -> Path:
    """A folder whose only site holds everybody's rows: what no federation may have, as the mark to reach."""
    return _linked(folder / "central" / "pooled", folder / "pooled")


def first_site(folder: Path) -> Path:
    """A folder whose only site is the split's first."""
    first = sites_of(folder)[0]
    return _linked(folder / "one-site" / first.name, first)


def _linked(link: Path, target: Path) -> Path:
    if target.exists() and not link.exists():
        link.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was quicker
            link.symlink_to(target)
    return link.parent
