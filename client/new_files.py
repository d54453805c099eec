"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes) -> None:
    """Write a file, its folder made where it is missing, through to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people to read."""
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` at once when it is complete, and vanishes on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as scratch:
        folder = Path(scratch, "new")
        folder.mkdir()
        yield folder
        if target.exists():
            target.rename(Path(scratch, "old"))
        folder.rename(target)
