"""`giva bases`: prove that this machine builds the same bases as every other; show the bases of an adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from giva_core.errors import CheckpointError
from giva_core.report import Report, Table

from .adapter import adapter_argument, find_adapter
from .options import store_option

if TYPE_CHECKING:
    from server.run_store import RunStore


@click.group()
def bases() -> None:
    """Prove that this machine builds the same bases; show bases."""


@bases.command("self-test")
def self_test() -> Report:
    """Check that this machine builds the same bases.

    Known bases are built here and their digest is compared; the exit code is 1 if it differs.
    """
    from giva_core import selftest

    found = selftest.run()
    data = asdict(found)
    rows = []
    for name, value in data.items():
        if isinstance(value, dict):
            rows += [(key.replace("_", " "), item) for key, item in value.items()]
        else:
            rows.append((name.replace("_", " "), value))
    note = (
        "This machine builds the same bases as every other."
        if found.passed
        else "This machine builds other bases: it must not take part in a run. Please report it with the lines above."
    )
    return Report("bases-self-test", data, (Table("Self-test", ("", ""), tuple(rows)),), (note,), int(not found.passed))


@bases.command("show")
@adapter_argument
@store_option
def show_bases(store: RunStore, target: str) -> Report:
    """Show the bases of an adapter: shapes, digest, orthonormality."""
    import numpy as np

    from giva_core.checkpoint import BASES_FILE, load_bases, load_metadata

    def error_of(gram: np.ndarray) -> float:
        """`max |gram − I|`."""
        return float(np.abs(gram - np.eye(len(gram))).max())

    folder, _ = find_adapter(store, target)
    if not (folder / BASES_FILE).exists() and not (known := load_metadata(folder)).bases_digest:
        raise CheckpointError("the adapter has no bases", got=f"method '{known.config.method}'")
    found = load_bases(folder)
    layers = []
    for name, basis in found.layers.items():
        A, B = basis.A.astype(np.float64), basis.B.astype(np.float64)
        shape = {"name": name, "d_out": len(B), "d_in": A.shape[1], "rank": len(A)}
        layers.append({**shape, "a_error": error_of(A @ A.T), "b_error": error_of(B.T @ B)})
    data = {"folder": folder, "init": found.init, "digest": found.digest, "layers": layers}
    about = (("folder", str(folder)), ("init", found.init), ("digest", found.digest), ("layers", len(layers)))
    columns = ("layer", "d_out", "d_in", "rank", "max |A Aᵀ − I|", "max |Bᵀ B − I|")
    rows = tuple(tuple(layer.values()) for layer in layers)
    return Report("bases-show", data, (Table("Bases", ("", ""), about), Table("Layers", columns, rows)))
