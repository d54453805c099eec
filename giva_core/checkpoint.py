"""Adapters on disk: safetensors and JSON, nothing that can execute, and every file complete or not there.

    adapter.json          configuration, schema, base model, versions, SHA-256 of the bases' file
    bases.safetensors     `<layer>.A (r, d_in)`, `<layer>.B (d_out, r)`; header: init, digest, layer order
    vectors.safetensors   `<layer>.lambda_o`, `<layer>.lambda_s` (or what another method trains), head, perhaps
                          residuals; header: SHA-256 of the arrays, and the digest of the bases they were trained on

The bases are written once. A later round replaces `vectors.safetensors` alone, which proves itself by its own header:
one rename, so a crash leaves the earlier round or the later one. Methods without bases have no `bases.safetensors`.
No path of the machine is written: of the model only its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from .bases import bases_digest
from .config import RunConfig
from .errors import BasesError, CheckpointError, ConfigError
from .factored import residual_columns, residual_shapes
from .protocol import arrays_digest
from .types import Arrays, Bases, BasesSet, LayerShape, ModelSchema

FORMAT = 1
ADAPTER_FILE, BASES_FILE, VECTORS_FILE = "adapter.json", "bases.safetensors", "vectors.safetensors"

#: Settings that say where things lie on one machine; they are not written.
_LOCAL = ("data.", "train.device")


@dataclass(frozen=True)
class AdapterMetadata:
    """What `adapter.json` tells.

    Attributes:
        config: The run's settings; `model.path` is the base model's name, `data.*` and the device are defaults.
        schema: The adapted layers, their ranks, and the shapes of everything else that was trained.
        bases_digest: Digest of the bases; empty for methods without.
        model_digest: SHA-256 of the base model below the head; empty where unknown.
        head_modules: Names of the modules that make up the head.
        versions: Version by library, of the machine that wrote the adapter.
    """

    config: RunConfig
    schema: ModelSchema
    bases_digest: str
    model_digest: str
    head_modules: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Attributes:
        bases: The frozen bases; `None` for methods without.
        arrays: The trained arrays, float32: vectors and head.
        residual: `<layer>.residual (d_out, r)` of mode `exact`, or fedex-lora's; empty elsewhere.
        metadata: Everything else.
    """

    bases: BasesSet | None
    arrays: Arrays
    residual: Arrays
    metadata: AdapterMetadata


# -- writing ----------------------------------------------------------------------------------------------------------


def save_bases(folder: str | Path, bases: BasesSet) -> Path:
    """Write `bases.safetensors` into `folder` and return its path.

    Raises:
        CheckpointError: The file cannot be written; an earlier one is untouched.
    """
    _write_files(Path(folder), {BASES_FILE: _bases_bytes(bases)})
    return Path(folder) / BASES_FILE


def save_adapter(
    folder: str | Path,
    bases: BasesSet | None,
    arrays: Arrays,
    config: RunConfig,
    *,
    residual: Arrays | None = None,
    model_digest: str = "",
    head_modules: Sequence[str] = (),
) -> Path:
    """Write a complete adapter into `folder`, which is made if need be, and return the folder.

    Args:
        folder: Where to.
        bases: The frozen bases; `None` for methods without.
        arrays: The trained arrays by name.
        config: The run's settings.
        residual: `<layer>.residual` by name, in mode `exact`.
        model_digest: SHA-256 of the base model below the head.
        head_modules: Names of the modules that make up the head.

    Raises:
        CheckpointError: Vectors do not fit the bases, or a file cannot be written; earlier files are untouched.
    """
    folder = Path(folder)
    layers = {} if bases is None else bases.layers
    shapes = tuple(LayerShape(name, layer.B.shape[0], layer.A.shape[1]) for name, layer in layers.items())
    ranks = tuple(layer.A.shape[0] for layer in layers.values())
    form = "core" if config.method == "lora-xs" else "vectors"
    vectors = ModelSchema(shapes, ranks, {}, form=form).vector_shapes()
    state = {name: value.shape for name, value in arrays.items() if name not in vectors}
    schema = ModelSchema(shapes, ranks, state, form=form)
    digest = bases.digest if bases else ""
    files = {} if bases is None else {BASES_FILE: _bases_bytes(bases)}
    described = {
        "format": FORMAT,
        "config": _portable(config),
        "model": {"name": _portable(config)["model.path"], "digest": model_digest},
        "head_modules": list(head_modules),
        "layers": [[layer.name, layer.d_out, layer.d_in, r] for layer, r in zip(shapes, ranks, strict=True)],
        "state": {name: list(shape) for name, shape in schema.state.items()},
        "form": form,
        "bases_digest": digest,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "versions": _versions(),
    }
    files[VECTORS_FILE] = _vectors_bytes(folder, schema, digest, arrays, residual or {})
    files[ADAPTER_FILE] = json.dumps(described, indent=2, ensure_ascii=False).encode()
    _write_files(folder, files)
    return folder


def save_vectors(folder: str | Path, arrays: Arrays, *, residual: Arrays | None = None) -> None:
    """Replace the trained arrays of an adapter that `save_adapter` wrote; bases and description stay.

    Args:
        folder: The adapter's folder.
        arrays: The trained arrays; names and shapes as before.
        residual: `<layer>.residual` by name, in mode `exact`.

    Raises:
        CheckpointError: No adapter there, arrays of another form, or the file cannot be written.
    """
    folder = Path(folder)
    known = _load_metadata(folder)[0]
    _write_files(
        folder, {VECTORS_FILE: _vectors_bytes(folder, known.schema, known.bases_digest, arrays, residual or {})}
    )


def _bases_bytes(bases: BasesSet) -> bytes:
    tensors: Arrays = {}
    for name, layer in bases.layers.items():
        tensors[f"{name}.A"], tensors[f"{name}.B"] = _float32(layer.A), _float32(layer.B)
    header = {
        "format": str(FORMAT),
        "init": bases.init,
        "digest": bases.digest,
        "layers": json.dumps(list(bases.layers)),
    }
    return safetensors.numpy.save(tensors, metadata=header)


def _vectors_bytes(folder: Path, schema: ModelSchema, digest: str, arrays: Arrays, residual: Arrays) -> bytes:
    tensors = {name: _float32(value) for name, value in {**arrays, **residual}.items()}
    _check_shapes(folder / VECTORS_FILE, schema, tensors)
    header = {"format": str(FORMAT), "bases_digest": digest, "sha256": arrays_digest(tensors)}
    return safetensors.numpy.save(tensors, metadata=header)


def _float32(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value, dtype=np.float32).reshape(np.shape(value))


def _portable(config: RunConfig) -> dict[str, Any]:
    """The settings without what belongs to one machine: of a folder only its name stays."""
    flat: dict[str, Any] = {key: value for key, value in config.to_flat().items() if not key.startswith(_LOCAL)}
    path = Path(config.model.path)
    if path.is_absolute() or config.model.path.startswith((".", "~", "$")) or path.is_dir():
        flat["model.path"] = path.name
    return flat


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fedgiva", "numpy", "safetensors", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # the server has no torch; a source checkout has no version
    return found


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files or none: every one is on disk under a temporary name before the first takes its place."""
    staged: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            staged.append((folder / f".{name}.{secrets.token_hex(4)}.tmp", folder / name))
            with open(staged[-1][0], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, target in staged:
            os.replace(temporary, target)
        sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"nothing could be written into {folder}",
            got=error.strerror or error,
            cause="a full disk, or a folder that may not be written to",
            remedy="free space or choose another folder; the earlier files are untouched",
            public="a checkpoint could not be written",
        ) from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can open folders (Windows cannot)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -- reading ----------------------------------------------------------------------------------------------------------


def load_bases(folder: str | Path) -> BasesSet:
    """Read `bases.safetensors` and prove it: the digest is computed again from the matrices.

    Raises:
        CheckpointError: The file is missing, damaged or of another version.
    """
    path = Path(folder) / BASES_FILE
    header, tensors = _read_tensors(path)
    try:
        names = json.loads(header["layers"])
        layers = {name: Bases(A=tensors[f"{name}.A"], B=tensors[f"{name}.B"]) for name in names}
        init, recorded = header["init"], header["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header or its matrices lack {error}") from error
    found = bases_digest(layers, init)
    if found != recorded:
        raise _damaged(path, f"bases digest {found[:12]}…, recorded as {recorded[:12]}…")
    return BasesSet(layers, init, found)


def load_metadata(folder: str | Path) -> AdapterMetadata:
    """Read `adapter.json` alone: what is there, before anything large is read.

    Raises:
        CheckpointError: The file is missing, damaged or of another version.
    """
    return _load_metadata(Path(folder))[0]


def load_adapter(folder: str | Path, bases: BasesSet | None = None) -> Adapter:
    """Read an adapter and check that its files are whole and belong together.

    Args:
        folder: As `save_adapter` wrote it.
        bases: The bases that several adapters share, from `load_bases`; without, they are read from the folder.

    Raises:
        CheckpointError: A file is missing, damaged or of another version.
        BasesError: The vectors were trained on other bases.
    """
    folder = Path(folder)
    known, hashes = _load_metadata(folder)
    told_by = ADAPTER_FILE
    if bases is None:
        told_by = BASES_FILE
        for name, expected in hashes.items():
            found = _file_digest(folder / name)
            if found != expected:
                raise _damaged(folder / name, f"SHA-256 {found[:12]}…, recorded as {expected[:12]}…")
        bases = load_bases(folder) if known.bases_digest else None
    present = bases.digest if bases else ""
    if present != known.bases_digest:
        raise _foreign_bases(folder / told_by, present, known.bases_digest)
    path = folder / VECTORS_FILE
    header, tensors = _read_tensors(path)
    if header.get("bases_digest", "") != present:
        raise _foreign_bases(path, header.get("bases_digest", ""), present)
    if header.get("sha256") != arrays_digest(tensors):
        raise _damaged(path, "its arrays do not have the recorded SHA-256")
    _check_shapes(path, known.schema, tensors)
    residual = {name: value for name, value in tensors.items() if name in _residual_shapes(known.schema, tensors)}
    arrays = {name: value for name, value in tensors.items() if name not in residual}
    return Adapter(bases, arrays, residual, known)


def _load_metadata(folder: Path) -> tuple[AdapterMetadata, dict[str, str]]:
    """The description, and SHA-256 by file name."""
    path = folder / ADAPTER_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has another format", got=f"format {raw['format']}", expected=f"format {FORMAT}",
                cause="it was written by another version", remedy="use the version that it names under 'versions'",
            )  # fmt: skip
        layers = tuple(LayerShape(name, int(d_out), int(d_in)) for name, d_out, d_in, _ in raw["layers"])
        ranks, state = tuple(int(row[3]) for row in raw["layers"]), {n: tuple(s) for n, s in raw["state"].items()}
        schema = ModelSchema(layers, ranks, state, form=raw.get("form", "vectors"))
        known = AdapterMetadata(
            config=RunConfig.from_flat(raw["config"]),
            schema=schema,
            bases_digest=raw["bases_digest"],
            model_digest=raw["model"]["digest"],
            head_modules=tuple(raw["head_modules"]),
            versions=dict(raw["versions"]),
        )
        hashes = {BASES_FILE: raw["sha256"][BASES_FILE]} if known.bases_digest else {}
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no adapter in {folder}", expected=ADAPTER_FILE, remedy="check the path"
        ) from None
    except ConfigError as error:
        raise CheckpointError(
            f"the settings in {path} cannot be read", got=error, cause="it was written by another version"
        ) from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return known, hashes


def _read_tensors(path: Path) -> tuple[dict[str, str], Arrays]:
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}", remedy="check the path, or restore the file"
        ) from None
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path.name} in {path.parent}", remedy="restore the file") from None
    except OSError as error:
        raise _damaged(path, error) from error


def _residual_shapes(schema: ModelSchema, tensors: Arrays) -> dict[str, tuple[int, ...]]:
    columns = residual_columns({name: value for name, value in tensors.items() if name not in schema.state})
    return residual_shapes(schema, columns) if columns else {}


def _check_shapes(path: Path, schema: ModelSchema, tensors: Arrays) -> None:
    """Exactly the arrays of the schema, float32; residuals for all layers or for none."""
    expected = {**schema.vector_shapes(), **schema.state, **_residual_shapes(schema, tensors)}
    for name in sorted(expected.keys() | tensors.keys()):
        shape = tensors[name].shape if name in tensors else "no such array"
        if name not in expected or shape != tuple(expected[name]) or tensors[name].dtype != np.float32:
            raise CheckpointError(
                f"{name} does not fit {path}", got=shape, expected=expected.get(name, "no such array"),
                cause="arrays of another model or another run", remedy="save a whole adapter with save_adapter",
            )  # fmt: skip


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged", got=reason, cause="an interrupted copy, a faulty disk, or a changed file",
        remedy="copy the adapter's folder again, or write it anew from the run",
    )  # fmt: skip


def _foreign_bases(path: Path, got: str, expected: str) -> BasesError:
    return BasesError(
        f"{path} belongs to other bases", got=f"bases digest {got[:12] or 'none'}", expected=expected[:12] or "none",
        cause="files of two adapters in one folder", remedy="copy the adapter's folder again, all files from one run",
    )  # fmt: skip
