"""`giva adapter`: show, verify and merge finished adapters."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from giva_core.errors import CheckpointError, ConfigError
from giva_core.report import Report, Table

from .options import store_option

if TYPE_CHECKING:
    import numpy as np

    from giva_core.checkpoint import Adapter
    from server.run_store import RunStore, RunSummary

F = TypeVar("F", bound=Callable[..., Any])


def adapter_argument(command: F) -> F:
    """`[PATH|RUN]`; the command receives `target`, to be resolved by `find_adapter`."""
    return click.argument("target", metavar="[PATH|RUN]", default="last")(command)


def find_adapter(store: RunStore, target: str) -> tuple[Path, RunSummary | None]:
    """The folder of an adapter, and the run that made it where a run was named.

    Raises:
        CheckpointError: The run has no adapter yet.
        StoreError: There is neither such a folder nor such a run.
    """
    if Path(target).is_dir() or os.sep in target:
        return Path(target), None
    summary = store.run(target)
    folder = store.adapter_folder(summary.run_id)
    if not folder.is_dir():
        raise CheckpointError(
            f"run {summary.run_id} has no adapter", got=f"status {summary.status}", cause="the run is not finished",
            remedy="finish it with `giva run resume`, or name another run or a folder",
        )  # fmt: skip
    return folder, summary


@click.group()
def adapter() -> None:
    """Show, verify and merge finished adapters.

    Name an adapter's folder, or the run that made it: its id, the beginning of one, or `last`.
    """


@adapter.command("show")
@adapter_argument
@store_option
def show_adapter(store: RunStore, target: str) -> Report:
    """Show layers, ranks, parameters and digests."""
    from giva_core.checkpoint import load_adapter

    folder, _ = find_adapter(store, target)
    loaded = load_adapter(folder)
    known = loaded.metadata
    vectors = known.schema.vector_shapes()
    counts = {
        "vectors": sum(array.size for name, array in loaded.arrays.items() if name in vectors),
        "other": sum(array.size for name, array in loaded.arrays.items() if name not in vectors),
    }
    layers = [
        {
            "name": layer.name,
            "d_out": layer.d_out,
            "d_in": layer.d_in,
            "rank": r,
            "delta_norm": _delta_norm(loaded, layer.name),
        }
        for layer, r in zip(known.schema.layers, known.schema.ranks, strict=True)
    ]
    data = {
        "folder": folder,
        "method": known.config.method,
        "base_model": known.config.model.path,
        "model_digest": known.model_digest,
        "init": loaded.bases.init if loaded.bases else None,
        "bases_digest": known.bases_digest or None,
        "mode": known.config.rounds.mode,
        "task": known.config.task.kind,
        "labels": known.config.task.labels,
        "parameters": counts,
        "has_residual": bool(loaded.residual),
        "head_modules": known.head_modules,
        "versions": known.versions,
        "layers": layers,
    }
    about = (
        ("folder", str(folder)),
        ("method", known.config.method),
        ("base model", known.config.model.path),
        ("base model digest", known.model_digest),
        ("initialisation", data["init"]),
        ("bases digest", data["bases_digest"]),
        ("aggregation mode", known.config.rounds.mode),
        ("task", known.config.task.kind),
        ("labels", ", ".join(known.config.task.labels)),
        ("parameters in vectors", counts["vectors"]),
        ("other parameters", counts["other"]),
        ("frozen residual", data["has_residual"]),
        ("head modules", ", ".join(known.head_modules)),
        *((f"{package} version", version) for package, version in known.versions.items()),
    )
    tables = [Table("Adapter", ("", ""), about)]
    if layers:
        rows = tuple(tuple(layer.values()) for layer in layers)
        tables.append(Table("Layers", ("layer", "d_out", "d_in", "rank", "norm of ΔW"), rows))
    return Report("adapter-show", data, tuple(tables))


@adapter.command("verify")
@adapter_argument
@store_option
def verify_adapter(store: RunStore, target: str) -> Report:
    """Check that an adapter is whole.

    Where a run is named, also that the adapter is that run's. The exit code is 1 if a check fails.
    """
    import numpy as np

    from giva_core.checkpoint import load_adapter
    from giva_core.protocol import arrays_digest

    folder, summary = find_adapter(store, target)
    try:
        loaded = load_adapter(folder)
    except CheckpointError as error:
        return _verified(folder, [("files are whole and belong together", False, str(error))])
    checks = [("files are whole and belong together", True, "")]
    arrays = {**loaded.arrays, **loaded.residual}
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    checks.append(("all values are finite", not bad, ", ".join(bad)))
    found = {"bases_digest": loaded.metadata.bases_digest, "model_digest": loaded.metadata.model_digest}
    found["arrays_digest"] = arrays_digest(arrays)
    for name, value in found.items():
        if summary and name in summary.facts:
            expected = str(summary.facts[name])
            detail = "" if value == expected else f"{value[:12]}… but the run recorded {expected[:12]}…"
            checks.append((f"{name.replace('_', ' ')} is the run's", value == expected, detail))
    return _verified(folder, checks)


@adapter.command("merge")
@adapter_argument
@click.option("--model", help="The base model: a folder, or its hub id.  [default: the run's]")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder of the merged model.")
@store_option
def merge_adapter(store: RunStore, target: str, model: str | None, output: Path) -> Report:
    """Merge an adapter into its base model."""
    folder, summary = find_adapter(store, target)
    if model is None and summary is None:
        raise ConfigError(
            "the base model is not known", expected="--model FOLDER", cause="an adapter does not tell where it lies"
        )
    if model is None and summary is not None:
        model = summary.config.model.path
    from giva_core.export import merge_to_folder

    written = merge_to_folder(folder, str(model), output)
    data = {"adapter": folder, "model": model, "output": written}
    return Report("adapter-merge", data, notes=(f"Wrote the merged model to {written}.",))


def _verified(folder: Path, checks: list[tuple[str, bool, str]]) -> Report:
    passed = all(ok for _, ok, _ in checks)
    data = {
        "folder": folder,
        "ok": passed,
        "checks": [{"check": check, "ok": ok, "detail": detail} for check, ok, detail in checks],
    }
    table = Table(f"Adapter {folder}", ("check", "passed", "detail"), tuple(checks))
    note = "The adapter is sound." if passed else "The adapter must not be used."
    return Report("adapter-verify", data, (table,), (note,), int(not passed))


def _delta_norm(loaded: Adapter, layer: str) -> float | None:
    """`‖ΔW‖_F = ‖M ∘ B‖_F`, for A has orthonormal rows; None for methods without bases."""
    import numpy as np

    from giva_core.aggregate import RESIDUAL, coefficients

    if loaded.bases is None:
        return None
    total: np.ndarray = coefficients(loaded.arrays, layer) * loaded.bases.layers[layer].B
    kept = loaded.residual.get(f"{layer}.{RESIDUAL}")
    return float(np.linalg.norm(total if kept is None else total + kept * loaded.bases.layers[layer].B))
