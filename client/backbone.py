"""The model of a run in this process: loaded once, shared by every site of the process, its adapter swapped in place.

A deployed site has one backbone, over all its runs that load the same; a simulation of a hundred sites has one as well,
since the sites take turns and differ only in the kilobytes they train. Every request brings the values of all that is
trained, so nothing of one site or run is left for the next.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from giva_core import bases as bases_module
from giva_core import calibration, checkpoint, inject, methods, models
from giva_core.aggregate import RESIDUAL
from giva_core.calibration import Sketches, Stage
from giva_core.config import RunConfig
from giva_core.errors import BasesError, GivaError
from giva_core.factored import is_residual
from giva_core.methods.lora import add_residual
from giva_core.paths import giva_home
from giva_core.protocol import arrays_digest
from giva_core.types import Arrays, BasesSet, ModelSchema

from .training import EncodedData, pick_device

#: Bases folders that stay on disk; a site that lost its bases builds them again from the server's sketch.
_KEPT_FOLDERS = 8
_DIGEST = re.compile(r"[0-9a-f]{64}")

_loaded: dict[str, Backbone] = {}
_loads = 0


class Backbone:
    """A task model, what it trains, and the adapter that is in it now.

    Attributes:
        task: The model with tokenizer and head.
        schema: What it trains and sends.
        frozen_digest: Digest of what the method froze by itself; empty where it has nothing such.
        bases_digest: The bases that are in it now; empty for none.
        rows: Tokenised rows of its sites, kept for as long as the model.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.task = models.load_task_model(config)
        self.model_digest = self.task.weights_digest()
        self.task.model.to(device).requires_grad_(False)
        heads = (*self.task.head_modules, *config.giva.modules_to_save)
        self.trained_modules = heads
        state_names = inject.module_state_names(self.task.model, heads)
        prepared = methods.prepare(self.task.model, config, heads)
        self.task.model.to(device)
        self.frozen_digest = arrays_digest(prepared.frozen) if prepared.frozen else ""
        self.initial_state = inject.read_state(self.task.model, (*prepared.trained, *state_names))
        shapes = {name: array.shape for name, array in self.initial_state.items()}
        self.schema = ModelSchema(prepared.layers, prepared.ranks, shapes, prepared.trained, prepared.form)
        self.bases_digest = ""
        self._weights: dict[str, torch.Tensor] = {}
        self.rows: OrderedDict[Hashable, EncodedData] = OrderedDict()
        self._known: OrderedDict[str, BasesSet] = OrderedDict()
        self._latest: tuple[bytes, Any] = (b"", None)

    def build(self, sketches: Sketches, coordinates: Sketches | None) -> BasesSet:
        """Build the bases from the federation's sketch and keep them: in memory, and on disk for the next process."""

        def make() -> BasesSet:
            schema, giva = self.schema, self.config.bases
            made = bases_module.build_bases(schema.layers, schema.ranks, sketches, giva, coordinates)
            self._remember(made)
            checkpoint.save_bases(_cache_folder(made.digest), made)
            _prune_cache()
            return made

        return self._once("bases", [sketches, coordinates or {}], make)

    def multipliers(self, stage: Stage, previous: Sketches | None) -> Arrays:
        """The matrices of a calibration pass, the same for every site of this process."""
        schema, giva = self.schema, self.config.bases
        return self._once(
            stage.name,
            [previous or {}],
            lambda: calibration.multipliers(stage, schema.layers, schema.ranks, giva, previous),
        )

    def _once(self, what: str, sources: list[Sketches], make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave for the same input: simulated sites need not repeat each other's arithmetic."""
        key = hashlib.sha256(what.encode())
        for sketches in sources:
            for name in sorted(sketches):
                key.update(name.encode() + sketches[name].codes.tobytes() + sketches[name].exponents.tobytes())
        if self._latest[0] != key.digest():
            self._latest = (key.digest(), make())
        return self._latest[1]

    def _remember(self, made: BasesSet) -> None:
        """Keep bases for `use`; the two newest stay."""
        self._known[made.digest] = made
        while len(self._known) > 2:
            self._known.popitem(last=False)

    def use(self, digest: str) -> None:
        """Put the bases with this digest into the model; an empty digest takes the adapter out.

        Raises:
            BasesError: This site never built them, or that is no digest.
        """
        if digest == self.bases_digest:
            return
        if self.bases_digest:
            inject.remove(self.task.model)
            self.bases_digest = ""
        if digest:
            kind = methods.layer_kind(self.config)
            inject.inject(self.task.model, self.bases(digest), dropout=self.config.giva.dropout, kind=kind)
            self.task.model.to(self.device)
            self.bases_digest = digest

    def bases(self, digest: str) -> BasesSet:
        """The bases with this digest, from memory or from this site's cache folder."""
        found = self._known.get(digest) or _load_cached(digest)
        self._remember(found)
        return found

    def write(self, arrays: Arrays) -> None:
        """Set vectors, head and residuals to the global arrays."""
        vector_names = self.schema.vector_shapes() if self.bases_digest else {}
        residual = {name: array for name, array in arrays.items() if is_residual(name)}
        inject.write_state(self.task.model, {n: a for n, a in arrays.items() if n in self.schema.state})
        if vector_names:
            inject.write_vectors(self.task.model, {n: arrays[n] for n in vector_names if n in arrays})
            inject.write_residual(self.task.model, {n.removesuffix(f".{RESIDUAL}"): a for n, a in residual.items()})
        elif self.config.method == "fedex-lora":
            add_residual(self.task.model, residual, self._weights)

    def read(self, names: tuple[str, ...]) -> Arrays:
        """The values of these arrays, in this order."""
        return inject.read_state(self.task.model, names)

    def parameters(self, names: tuple[str, ...]) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """Switch the gradient on for these parameters alone; return the adapter's and the others."""
        found = dict(self.task.model.named_parameters())
        self.task.model.requires_grad_(False)
        adapter: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name in names:
            if name not in found:
                continue  # a buffer: averaged, not trained by gradient
            found[name].requires_grad_(True)
            is_head = any(name.startswith(f"{module}.") for module in self.trained_modules)
            (others if is_head else adapter).append(found[name])
        return adapter, others


def get_backbone(config: RunConfig, device_name: str) -> Backbone:
    """The backbone for this run in this process, loaded at the first call, and kept for runs that load the same."""
    global _loads
    parts = (config.model, config.task, config.giva, config.lora, config.vera, config.randlora, config.lora_xs)
    key = json.dumps([config.method, device_name, *(part.to_json() for part in parts)])
    if key not in _loaded:
        _loaded.clear()  # one at a time: two large models may not fit
        _loaded[key] = Backbone(config, pick_device(device_name))
        _loads += 1
    return _loaded[key]


def model_loads() -> int:
    """How often a model was loaded in this process."""
    return _loads


def drop_backbones() -> None:
    """Forget every loaded model."""
    _loaded.clear()


def _cache_folder(digest: str) -> Path:
    """The folder of these bases. The digest may be the server's word, and becomes a folder's name only as what it is.

    Raises:
        BasesError: It is no SHA-256 in hexadecimal digits.
    """
    if not _DIGEST.fullmatch(digest):
        raise BasesError(
            "that is no digest of bases", got=repr(digest[:80]), expected="64 hexadecimal digits", public="not a digest"
        )
    return giva_home() / "cache" / "bases" / digest


def _prune_cache() -> None:
    """Keep the newest folders; another process may do the same at the same time."""
    found = []
    for folder in (giva_home() / "cache" / "bases").iterdir():
        with suppress(FileNotFoundError):
            if _DIGEST.fullmatch(folder.name):
                found.append((folder.stat().st_mtime_ns, folder))
    for _, folder in sorted(found)[:-_KEPT_FOLDERS]:
        shutil.rmtree(folder, ignore_errors=True)


def _load_cached(digest: str) -> BasesSet:
    folder = _cache_folder(digest)
    try:
        found = checkpoint.load_bases(folder)
    except (GivaError, OSError) as error:
        raise BasesError(
            f"this site does not hold the bases {digest[:12]}…",
            got=error,
            cause="the site was restarted with an empty cache folder, or never built them",
            remedy="let the server send the aggregate sketch again",
            public=f"bases {digest[:12]} not held here",
        ) from None
    if found.digest != digest:
        raise BasesError(
            f"the cached bases {digest[:12]}… have digest {found.digest[:12]}…",
            cause="a changed cache file",
            remedy="empty the cache folder",
            public=f"bases {digest[:12]} not held here",
        )
    return found
