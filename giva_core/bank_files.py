"""A folder of many adapters that share their bases: the bases once, for each task its vectors.

    bases/<digest>/bases.safetensors    as `save_bases` writes it; the folder is named by the digest
    tasks/<task>/adapter.json           as `save_adapter` writes it; names the digest of the bases it needs
    tasks/<task>/vectors.safetensors    the trained arrays of the task, and the digest again

A task costs d_out + r numbers a layer, and its head. Tasks on other bases may lie in the same folder. Every folder
appears complete or not at all, so a bank may be read while tasks are added to it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import (
    ADAPTER_FILE,
    BASES_FILE,
    VECTORS_FILE,
    Adapter,
    load_adapter,
    load_bases,
    load_metadata,
    sync_folder,
)
from .errors import CheckpointError
from .types import BasesSet

_BASES, _TASKS = "bases", "tasks"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def add_task(bank: str | Path, adapter_folder: str | Path, task: str) -> Path:
    """Copy an adapter's vectors into a bank, and its bases where the bank does not have them yet.

    Args:
        bank: The bank's folder; made if need be.
        adapter_folder: As `save_adapter` wrote it.
        task: The task's name in the bank: letters, digits, `.`, `_`, `-`.

    Returns:
        The task's folder.

    Raises:
        CheckpointError: The adapter is damaged or has no bases, the name is taken or not a name, or the bank cannot be
            written.
    """
    source, bank = Path(adapter_folder), Path(bank)
    if not _NAME.fullmatch(task):
        raise CheckpointError(
            f"'{task}' is no name for a task",
            expected="letters, digits, '.', '_' and '-'",
            remedy="give another name; on the command line with --name",
        )
    adapter = load_adapter(source)
    digest = adapter.metadata.bases_digest
    if not digest or adapter.metadata.schema.form != "vectors":
        raise CheckpointError(
            "the adapter has no bases to share, or no vectors",
            got=f"method '{adapter.metadata.config.method}'",
            expected="an adapter of method giva",
            remedy="export it in another format",
        )
    home = bank / _BASES / digest
    if not home.exists():
        try:
            with new_folder(home) as staged:
                shutil.copyfile(source / BASES_FILE, staged / BASES_FILE)
        except CheckpointError:
            if not home.exists():
                raise  # else another process added the same bases at the same time: they are as good
    found = load_bases(home).digest
    if found != digest:
        raise CheckpointError(
            f"{home} holds other bases than its name tells",
            got=f"bases digest {found[:12]}…",
            expected=f"{digest[:12]}…",
            cause="a file that was put there by hand",
            remedy="remove this folder and add its tasks again",
        )
    if (bank / _TASKS / task).exists():
        raise CheckpointError(
            f"the bank has a task '{task}' already",
            got=str(bank / _TASKS / task),
            remedy="give another name (on the command line with --name), or remove this folder",
        )
    with new_folder(bank / _TASKS / task) as staged:
        for name in (ADAPTER_FILE, VECTORS_FILE):
            shutil.copyfile(source / name, staged / name)
    return bank / _TASKS / task


def list_tasks(bank: str | Path) -> dict[str, str]:
    """The digest of the bases of each task, by the task's name, sorted.

    Raises:
        CheckpointError: The folder holds no tasks, or a description is damaged.
    """
    folders = sorted(path for path in (Path(bank) / _TASKS).glob("*") if _NAME.fullmatch(path.name))
    if not folders:
        raise CheckpointError(f"there are no tasks in {bank}", expected=f"{_TASKS}/<task>", remedy="check the path")
    return {path.name: load_metadata(path).bases_digest for path in folders}


def read_bases(bank: str | Path, digest: str) -> BasesSet:
    """The bases of that digest.

    Raises:
        CheckpointError: They are not in the bank, or damaged.
    """
    if not _DIGEST.fullmatch(digest):  # it came out of a file, and becomes part of a path
        raise CheckpointError(f"'{digest}' is no digest of bases", expected="64 hexadecimal digits")
    return load_bases(Path(bank) / _BASES / digest)


def read_task(bank: str | Path, task: str, bases: BasesSet) -> Adapter:
    """One task's adapter, on bases that were read before.

    Raises:
        CheckpointError: There is no such task, or it is damaged.
        BasesError: The task was trained on other bases.
    """
    return load_adapter(Path(bank) / _TASKS / task, bases)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder, which takes the place of `output` when the block ends without an error.

    Raises:
        CheckpointError: `output` is there and not empty, or cannot be written; nothing is left behind.
    """
    refuse_existing(output)
    staged = output.parent / f".{output.name}.{secrets.token_hex(4)}.tmp"
    try:
        staged.mkdir(parents=True)
        yield staged
        for path in staged.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes 0600, and who serves a model is seldom who made it
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if output.exists():
            output.rmdir()
        os.replace(staged, output)
        sync_folder(output.parent)
    except OSError as error:
        raise CheckpointError(
            f"nothing could be written to {output}",
            got=error.strerror or error,
            cause="a full disk, or a folder that may not be written to",
            remedy="free space or choose another folder; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def refuse_existing(output: Path) -> None:
    """Raise `CheckpointError` where `output` is there and not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is not empty", expected="a new folder", remedy="choose another output folder")
