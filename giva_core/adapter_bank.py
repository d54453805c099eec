"""Many adapters on one model: the bases once, two vectors a layer for each task, switched by name or row by row.

Gangwar et al., arXiv:2604.21901, adapt a layer with frozen A, B and two trained vectors; adapters trained on the same
bases differ in the vectors alone. The bank holds all vectors in one table, a row for each adapter,

    table (adapters, Σ (d_out + r)),   row t = the vectors of task t, all layers side by side

so that switching is a change of one number, and a mixed batch gathers a row for each of its examples:

    y_n = base(x_n) + lambda_o[t_n] ∘ B (lambda_s[t_n] ∘ A x_n)

where LoRA has to multiply with other matrices for every task in the batch. Heads are kept by task as well, and may have
different numbers of outputs. A bank serves and does not train; it is not for several threads at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from . import bank_files, inject
from .aggregate import RESIDUAL
from .bank_layers import BASE_ROW, BankHead, BankLinear, Table
from .errors import BasesError, CheckpointError, NumericsError, ProtocolError, TargetError
from .types import Arrays, BasesSet

if TYPE_CHECKING:
    from .models import TaskModel


class AdapterBank:
    """The adapters of many tasks on one model, in place.

    With no adapter in use the model computes what the base model does.

    Args:
        model: The plain model, on the device where it is to serve; its layers named in `bases` are replaced, and all
            its parameters frozen.
        bases: The bases that all adapters share.
        heads: Modules that each task has its own weights for.
        capacity: Adapters to make room for; the table grows by doubling where more come.
        dtype: Type of the stored vectors and heads; `float16` halves the memory, and rounds to 11 bits.

    Raises:
        TargetError: A layer or head is not there, or cannot be adapted; the model is adapted already.
        BasesError: Bases that do not fit their layer. The model is left as it was.

    Example:
        bank = AdapterBank.open(task, "bank")
        bank.switch("cardiology")
        with bank.route(["cardiology", "neurology", None]):
            logits = task.forward(batch_of_three)
    """

    def __init__(
        self,
        model: nn.Module,
        bases: BasesSet,
        *,
        heads: Collection[str] = (),
        capacity: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if inject.adapted_layers(model) or any(isinstance(module, BankLinear) for module in model.modules()):
            raise TargetError("the model is adapted already", remedy="load the plain base model")
        targets = dict(inject.find_targets(model, tuple(bases.layers), exclude=heads))
        columns: dict[str, slice] = {}
        end = 0
        for name, layer in bases.layers.items():
            columns[f"{name}.lambda_o"] = slice(end, end + layer.B.shape[0])
            end += layer.B.shape[0]
            columns[f"{name}.lambda_s"] = slice(end, end + layer.B.shape[1])
            end += layer.B.shape[1]
        self.model, self.bases = model, bases
        self._table = Table(end, capacity, dtype, next(iter(targets.values())).weight.device)  # type: ignore[arg-type]
        self._columns = columns
        starts = {name: columns[f"{name}.lambda_o"].start for name in bases.layers}
        new: dict[str, nn.Module] = {
            name: BankLinear(name, targets[name], layer.A, layer.B, self._table, starts[name])
            for name, layer in bases.layers.items()
        }
        self._heads = {name: BankHead(model.get_submodule(name), self._table) for name in heads}
        self._rows: dict[str, int] = {}
        self._free = list(range(capacity, BASE_ROW, -1))
        model.requires_grad_(False)
        for name, module in (new | self._heads).items():
            model.set_submodule(name, module)

    @classmethod
    def open(
        cls,
        task: TaskModel,
        folder: str | Path,
        names: Collection[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> AdapterBank:
        """A bank with the tasks of a folder that `giva adapter export --format giva` wrote.

        Args:
            task: The base model that the adapters were trained on.
            folder: The bank's folder.
            names: The tasks to load; all without. They must share their bases.
            dtype: Type of the stored vectors and heads.

        Raises:
            CheckpointError: A file is damaged or missing, or an adapter was trained on another base model.
            BasesError: The tasks do not share their bases.
        """
        known = bank_files.list_tasks(folder)
        chosen = list(known) if names is None else list(names)
        if missing := [name for name in chosen if name not in known]:
            raise CheckpointError(f"the bank has no task '{missing[0]}'", expected=_nearby(missing[0], known))
        digests = sorted({known[name] for name in chosen})
        if len(digests) != 1:
            raise BasesError(
                "the tasks do not share their bases",
                got=f"{len(digests)} digests: {', '.join(digest[:12] for digest in digests)}",
                expected="one",
                cause="tasks of several federations in one bank",
                remedy="open those with the same digest, by name",
            )
        bases = bank_files.read_bases(folder, digests[0])
        heads = task.head_modules
        digest = task.weights_digest()
        bank = cls(task.model, bases, heads=heads, capacity=len(chosen), dtype=dtype)
        for name in chosen:
            adapter = bank_files.read_task(folder, name, bases)
            expected = adapter.metadata.model_digest
            if expected and expected != digest:
                raise CheckpointError(
                    f"task '{name}' was trained on another base model",
                    got=f"weights digest {digest[:12]}…",
                    expected=f"{expected[:12]}… of '{adapter.metadata.config.model.path}'",
                    cause="a model folder of another name, revision or model.dtype",
                )
            bank.add(name, adapter.arrays, adapter.residual)
        return bank

    # -- the adapters -------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order they came."""
        return tuple(self._rows)

    @property
    def active(self) -> str | None:
        """The adapter in use outside `route`; None for the base model."""
        return next((name for name, row in self._rows.items() if row == self._table.row), None)

    @property
    def nbytes(self) -> int:
        """Bytes that the adapters take: vectors, residuals and heads; the bases are the model's and come once."""
        return self._table.nbytes + sum(head.nbytes for head in self._heads.values())

    def add(self, name: str, arrays: Arrays, residual: Mapping[str, np.ndarray] | None = None) -> None:
        """Put an adapter into the bank; it is not switched to.

        Args:
            name: Its name.
            arrays: `<layer>.lambda_o (d_out,)` and `<layer>.lambda_s (r,)` of every layer, and arrays inside the heads.
            residual: `<layer>.residual (d_out, r)` of every layer, in mode `exact`.

        Raises:
            ProtocolError: The name is taken; arrays are missing, unknown or of the wrong shape.
            NumericsError: An array is not finite in the bank's dtype.
        """
        if name in self._rows:
            raise ProtocolError(f"the bank has an adapter '{name}' already", remedy="remove it first")
        stored = self._checked(name, arrays, residual or {})
        if not self._free:
            old = len(self._table.values)
            self._table.grow()
            self._free = list(range(len(self._table.values) - 1, old - 1, -1))
        row = self._free.pop()
        self._table.values[row] = torch.cat([stored[vector] for vector in self._columns])
        if residual:
            self._table.residuals[row] = {key.removesuffix(f".{RESIDUAL}"): stored[key] for key in residual}
        for module, head in self._heads.items():
            inside = [key for key in stored if key.startswith(f"{module}.")]
            if inside:
                head.states[row] = {key.removeprefix(f"{module}."): stored[key] for key in inside}
        self._rows[name] = row

    def remove(self, name: str) -> None:
        """Take an adapter out; where it was in use, the base model is.

        Raises:
            ProtocolError: There is no such adapter.
        """
        row = self._row(name)
        del self._rows[name]
        self._table.values[row] = 0
        self._table.residuals.pop(row, None)
        for head in self._heads.values():
            head.states.pop(row, None)
        if self._table.row == row:
            self._table.row = BASE_ROW
        self._free.append(row)

    def switch(self, name: str | None) -> None:
        """Use an adapter for every example from now on; None for the base model.

        Raises:
            ProtocolError: There is no such adapter.
        """
        self._table.row = self._row(name)

    @contextmanager
    def route(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within this context, example i of a batch goes through adapter `names[i]`.

        Args:
            names: One for each example, None for the base model.

        Raises:
            ProtocolError: No names, or no such adapter; inside, that the batch has another size.
        """
        if not names:
            raise ProtocolError("a batch needs a name for each example to be routed", got="none")
        rows = torch.tensor([self._row(name) for name in names], device=self._table.values.device)
        before, self._table.rows = self._table.rows, rows
        try:
            yield
        finally:
            self._table.rows = before

    def close(self) -> nn.Module:
        """Put the base model's own layers back, and return it."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, BankLinear):
                self.model.set_submodule(name, module.base_layer)
        for name, head in self._heads.items():
            self.model.set_submodule(name, head.base)
        return self.model

    # -- parts --------------------------------------------------------------------------------------------------------

    def _row(self, name: str | None) -> int:
        if name is None:
            return BASE_ROW
        if name not in self._rows:
            raise ProtocolError(f"the bank has no adapter '{name}'", expected=_nearby(name, self._rows))
        return self._rows[name]

    def _checked(self, name: str, arrays: Arrays, residual: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """All arrays as the bank stores them, after everything was compared with the bank."""
        expected: dict[str, tuple[int, ...]] = {key: (s.stop - s.start,) for key, s in self._columns.items()}
        if residual:
            expected |= {f"{layer}.{RESIDUAL}": pair.B.shape for layer, pair in self.bases.layers.items()}
        stored: dict[str, Tensor] = {}
        given = {**arrays, **residual}
        for key, value in given.items():
            module = next((head for head in self._heads if key.startswith(f"{head}.")), None)
            if key not in expected and module is not None:
                inner = key.removeprefix(f"{module}.")
                own = self._heads[module].base.state_dict().get(inner)
                if own is not None and value.ndim == own.ndim:
                    expected[key] = (*value.shape[:1], *own.shape[1:])  # tasks may differ in their number of outputs
        for key in sorted(expected.keys() | given.keys()):
            found = given[key].shape if key in given else "no such array"
            if found != expected.get(key):
                raise ProtocolError(
                    f"'{key}' of adapter '{name}' does not fit the bank",
                    got=found,
                    expected=expected.get(key, "no such array"),
                    cause="an adapter of another model, other bases or another head",
                )
            stored[key] = torch.tensor(given[key]).to(self._table.values)
            if not stored[key].isfinite().all():  # after the cast: float16 ends at 65504
                finite = bool(np.isfinite(given[key]).all())
                dtype = str(self._table.values.dtype).removeprefix("torch.")
                raise NumericsError(
                    f"'{key}' of adapter '{name}' has entries that are not finite in {dtype}",
                    cause=f"entries too large for {dtype}" if finite else "a training that diverged, or a damaged file",
                    remedy="open the bank with dtype=torch.float32" if finite else "train the adapter again",
                )
        return stored


def _nearby(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or list(known)[:5]
    return f"for example {', '.join(close)}" if close else "an adapter that was added before"
