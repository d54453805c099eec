"""Where this project keeps what it writes: one folder, `$GIVA_HOME`, by default `~/.giva`."""

from __future__ import annotations

import os
from pathlib import Path


def giva_home() -> Path:
    """`$GIVA_HOME`, or `~/.giva` where it is not set."""
    return Path(os.environ.get("GIVA_HOME") or "~/.giva").expanduser()


def expand(path: str) -> Path:
    """`path` with a leading `~` or `$GIVA_HOME` replaced."""
    for prefix in ("$GIVA_HOME", "${GIVA_HOME}"):
        if path == prefix or path.startswith(prefix + "/"):
            return giva_home() / path[len(prefix) :].lstrip("/")
    return Path(path).expanduser()
