"""The layers of an adapter bank: they look their vectors up in one table, by task or row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .errors import ProtocolError
from .layer import check_bases, linear_shape

#: The row of no adapter: vectors of zeros, so that the base model's output comes out.
BASE_ROW = 0


class Table:
    """The vectors of all adapters, and which of them are in use; shared by all layers of a bank.

    Attributes:
        values: `(adapters + 1, numbers)`; row 0 holds zeros, the base model.
        row: The adapter of every example, where `rows` is None.
        rows: int64 `(n,)`, the adapter of each example of the batch.
        residuals: Residual coefficients of mode `exact` by row and layer, `(d_out, r)`; most adapters have none.
    """

    def __init__(self, numbers: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(capacity + 1, numbers, dtype=dtype, device=device)
        self.row = BASE_ROW
        self.rows: Tensor | None = None
        self.residuals: dict[int, dict[str, Tensor]] = {}

    def grow(self) -> None:
        """Make room for twice as many adapters."""
        self.values = torch.cat([self.values, torch.zeros_like(self.values)])

    @property
    def nbytes(self) -> int:
        """Bytes of vectors and residuals."""
        kept = (residual for layers in self.residuals.values() for residual in layers.values())
        return self.values.nbytes + sum(residual.nbytes for residual in kept)

    def rows_of(self, x: Tensor) -> Tensor | None:
        """The adapter of each entry of x's first axis; None where all have the same one.

        Generation with beams repeats every example; then its adapter is repeated too.

        Raises:
            ProtocolError: The first axis is not that of the examples.
        """
        if self.rows is None:
            return None
        repeats, rest = divmod(x.shape[0], len(self.rows))
        if rest or repeats == 0 or (repeats > 1 and x.ndim < 3):
            raise ProtocolError(
                "a layer's input does not have one entry for each example",
                got=f"shape {tuple(x.shape)} for {len(self.rows)} routed examples",
                expected="(examples, ..., features)",
                cause="a batch of another size, or a model that joins the tokens of all examples in one axis",
                remedy="route as many names as the batch has examples; else switch(name) and one task a batch",
            )
        return self.rows if repeats == 1 else self.rows.repeat_interleave(repeats)


class BankLinear(nn.Module):
    """A frozen linear layer plus the adapter that the table has in use.

        y = base(x) + lambda_o ∘ B (lambda_s ∘ A x) + (R ∘ B) A x        x (n, ..., d_in) → y (n, ..., d_out)

    Args:
        name: The layer's name, under which residuals are kept.
        base_layer: The layer that it takes the place of.
        A: `(r, d_in)`.
        B: `(d_out, r)`.
        table: Shared by all layers.
        start: The table's first column of this layer: `lambda_o (d_out,)`, then `lambda_s (r,)`.

    Raises:
        TargetError: `base_layer` is not a linear layer.
        BasesError: A or B does not fit it.

    Source: arXiv:2604.21901; the table is ours.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, name: str, base_layer: nn.Module, A: np.ndarray, B: np.ndarray, table: Table, start: int
    ) -> None:
        super().__init__()
        check_bases(linear_shape(base_layer, name), A, B)
        self.name, self.base_layer, self.table = name, base_layer, table
        self._middle, self._start = start + B.shape[0], start
        self._end = self._middle + B.shape[1]
        self.register_buffer("A", torch.tensor(A, device=self.weight.device), persistent=False)
        self.register_buffer("B", torch.tensor(B, device=self.weight.device), persistent=False)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: models ask what they believe to be a plain linear layer for its type."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output plus that of each example's adapter."""
        y: Tensor = self.base_layer(input)
        table = self.table
        rows = table.rows_of(input)
        if rows is None and table.row == BASE_ROW:
            return y
        h = F.linear(input, self.A.to(input.dtype))  # (n, ..., r)
        numbers = table.values[:, self._start : self._end]
        vectors = numbers[table.row] if rows is None else numbers.index_select(0, rows)
        vectors = vectors.to(h.dtype)
        if rows is not None:
            vectors = vectors.view(len(rows), *(1,) * (h.ndim - 2), -1)
        lambda_o, lambda_s = vectors.split([self._middle - self._start, self._end - self._middle], dim=-1)
        y = torch.addcmul(y, F.linear(h * lambda_s, self.B.to(h.dtype)).to(y.dtype), lambda_o.to(y.dtype))
        return y + self._residual(h, rows).to(y.dtype) if table.residuals else y

    def _residual(self, h: Tensor, rows: Tensor | None) -> Tensor:
        """`h (R ∘ B)ᵀ`, zero for adapters without a residual."""
        kept = self.table.residuals
        if rows is None:
            if self.table.row not in kept:
                return h.new_zeros(())
            return F.linear(h, (kept[self.table.row][self.name].float() * self.B).to(h.dtype))
        zero = torch.zeros_like(self.B)
        found = [kept[row][self.name].float() if row in kept else zero for row in rows.tolist()]
        M = (torch.stack(found) * self.B).to(h.dtype)  # (n, d_out, r)
        return torch.bmm(h.reshape(len(rows), -1, h.shape[-1]), M.mT).view(*h.shape[:-1], -1)


class BankHead(nn.Module):
    """A module that each task has its own weights for: a classification head.

    In a mixed batch every task's examples pass through the task's own weights, one task after the other; where heads
    have different numbers of outputs, the missing ones are −∞, which no softmax and no argmax chooses.

    Args:
        base: The base model's own head.
        table: Shared by all layers.
    """

    def __init__(self, base: nn.Module, table: Table) -> None:
        super().__init__()
        self.base, self.table = base, table
        self.states: dict[int, dict[str, Tensor]] = {}
        self.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the head of each example's task computes."""
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        rows = self.table.rows_of(first)
        if rows is None:
            return self._call(self.table.row, args, kwargs)
        n = len(rows)

        def chosen(value: Any, index: Tensor) -> Any:
            return value[index] if isinstance(value, Tensor) and value.ndim and value.shape[0] == n else value

        parts: list[tuple[Tensor, Tensor]] = []
        for row in dict.fromkeys(rows.tolist()):
            index = (rows == row).nonzero().squeeze(-1)
            some = {key: chosen(value, index) for key, value in kwargs.items()}
            parts.append((index, self._call(row, [chosen(value, index) for value in args], some)))
        shape = (n, *parts[0][1].shape[1:-1], max(part.shape[-1] for _, part in parts))
        out = parts[0][1].new_full(shape, -torch.inf)
        for index, part in parts:
            out[index, ..., : part.shape[-1]] = part
        return out

    def _call(self, row: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        state = self.states.get(row)
        if state is None:
            return self.base(*args, **kwargs)
        own = dict(self.base.named_parameters())
        weights = {name: value.to(own[name].dtype) if name in own else value for name, value in state.items()}
        return functional_call(self.base, weights, tuple(args), dict(kwargs))

    @property
    def nbytes(self) -> int:
        """Bytes of all tasks' heads."""
        return sum(value.nbytes for state in self.states.values() for value in state.values())
