"""`giva adapter`: show, verify and export finished adapters."""

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
        if _is_bank(Path(target)) or (Path(target).is_dir() and _is_bank(Path(target).resolve().parent.parent)):
            raise CheckpointError(
                f"{target} is a bank of tasks, or one of its tasks, and no adapter",
                expected="the run's id, or the folder that the bank was exported from",
                remedy="open a bank with giva_core.AdapterBank.open",
            )
        return Path(target), None
    summary = store.run(target)
    folder = store.adapter_folder(summary.run_id)
    if not folder.is_dir():
        raise CheckpointError(
            f"run {summary.run_id} has no adapter", got=f"status {summary.status}", cause="the run is not finished",
            remedy="finish it with `giva run resume`, or name another run or a folder",
        )  # fmt: skip
    return folder, summary


def _is_bank(folder: Path) -> bool:
    return (folder / "tasks").is_dir() and (folder / "bases").is_dir()


@click.group()
def adapter() -> None:
    """Show, verify and export finished adapters.

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


@adapter.command("export")
@adapter_argument
@click.option(
    "--format", "form", required=True, type=click.Choice(["lora", "merged", "giva"]),
    help="lora: PEFT's format, exact; merged: a plain model; giva: vectors beside bases that tasks share.",
)  # fmt: skip
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder; for giva, the bank's.")
@click.option("--model", help="The base model: a folder, or its hub id.  [default: the run's]")
@click.option("--name", help="Name of the task in the bank, for giva.  [default: the run's name, or its id]")
@store_option
def export_adapter(
    store: RunStore, target: str, form: str, output: Path, model: str | None, name: str | None
) -> Report:
    """Write an adapter in the form that others read."""
    folder, summary = find_adapter(store, target)
    if name is not None and form != "giva":
        raise ConfigError("--name is for --format giva", got=f"--format {form}")
    if form == "merged":
        return _merge(folder, _base_model(model, summary), output, "adapter-export")
    if form == "lora":
        from giva_core.lora_export import lora_to_folder

        written = lora_to_folder(folder, output, model or (summary.config.model.path if summary else ""))
        note = f'Load it with peft.PeftModel.from_pretrained(model, "{written}").'
    else:
        from giva_core.bank_files import add_task, list_tasks

        name = name or (summary.config.name or summary.run_id if summary else folder.name)
        written = add_task(output, folder, name)
        note = f"Task '{name}' is in the bank {output}."
        tasks = list_tasks(output)
        if strangers := [task for task, digest in tasks.items() if digest != tasks[name]]:
            note += f" {len(strangers)} of its {len(tasks)} tasks are on other bases ({strangers[0]}): open them apart."
    data = {"adapter": folder, "format": form, "model": model, "output": written, "task": name}
    return Report("adapter-export", data, notes=(f"Wrote {written}.", note))


@adapter.command("merge")
@adapter_argument
@click.option("--model", help="The base model: a folder, or its hub id.  [default: the run's]")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder of the merged model.")
@store_option
def merge_adapter(store: RunStore, target: str, model: str | None, output: Path) -> Report:
    """Merge an adapter into its base model: `export --format merged`."""
    folder, summary = find_adapter(store, target)
    return _merge(folder, _base_model(model, summary), output, "adapter-merge")


def _base_model(model: str | None, summary: RunSummary | None) -> str:
    if model is not None:
        return model
    if summary is None:
        raise ConfigError(
            "the base model is not known", expected="--model FOLDER", cause="an adapter does not tell where it lies"
        )
    return summary.config.model.path


def _merge(folder: Path, model: str, output: Path, kind: str) -> Report:
    from giva_core.export import merge_to_folder

    written = merge_to_folder(folder, model, output)
    data: dict[str, Any] = {"adapter": folder, "model": model, "output": written}
    if kind == "adapter-export":
        data |= {"format": "merged", "task": None}
    return Report(kind, data, notes=(f"Wrote the merged model to {written}.",))


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
    """`‖ΔW‖_F = ‖M‖_F` with ΔW = M A, for A has orthonormal rows; None for methods without bases."""
    import numpy as np

    from giva_core.aggregate import RESIDUAL, layer_coefficients

    if loaded.bases is None:
        return None
    kept = loaded.residual.get(f"{layer}.{RESIDUAL}")
    return float(np.linalg.norm(layer_coefficients(loaded.arrays, loaded.bases, layer, kept)))
