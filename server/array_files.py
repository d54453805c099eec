"""Files of named arrays: written whole or not at all, and read only where they are what was recorded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import safetensors.numpy

from giva_core.errors import CheckpointError
from giva_core.types import Arrays


def serialise(arrays: Arrays) -> bytes:
    """safetensors' bytes; it writes memory as it lies, so views are made contiguous first."""
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def read_arrays(file: Path, sha256: str) -> Arrays:
    """The arrays in `file`.

    Raises:
        CheckpointError: It is missing, or its SHA-256 (hex) is not `sha256`.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read", got=error.strerror, remedy="restore the file from a backup"
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise CheckpointError(
            f"{file} is not what was recorded",
            got=f"SHA-256 {found[:12]}…",
            expected=f"{sha256[:12]}…",
            cause="a damaged disk, or the file was changed by hand",
            remedy="restore the file from a backup",
        )
    return safetensors.numpy.load(content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is complete or not there, even after a loss of power; one of that name is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name must be on disk before the database refers to it
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
