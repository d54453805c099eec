"""Plain modules to adapt, with bases for them: shapes only, all unequal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from giva_core.bases import bases_digest
from giva_core.layer import GivaLinear
from giva_core.types import Bases, BasesSet, LayerShape

HIDDEN, INNER, VOCAB, LABELS = 6, 10, 13, 3
D_OUT, D_IN, R = 7, 11, 3
#: The layers of `Toy` that all-linear adapts.
BACKBONE = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")


class Conv1D(nn.Module):
    """The form of transformers' layer of this name: the weight is `(d_in, d_out)`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Toy(nn.Module):
    """An embedding, two blocks, an output embedding that may be tied, and a head with a buffer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head = nn.Sequential(nn.Linear(HIDDEN, LABELS), nn.BatchNorm1d(LABELS))
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def make_bases(layers: Sequence[LayerShape], ranks: Sequence[int], seed: int | np.random.Generator = 0) -> BasesSet:
    """Random orthonormal bases."""
    rng = np.random.default_rng(seed)
    made = {
        layer.name: Bases(
            np.linalg.qr(rng.normal(size=(layer.d_in, r)))[0].T.astype(np.float32).copy(),
            np.linalg.qr(rng.normal(size=(layer.d_out, r)))[0].astype(np.float32),
        )
        for layer, r in zip(layers, ranks, strict=True)
    }
    return BasesSet(made, "rand", bases_digest(made, "rand"))


# -- one layer --------------------------------------------------------------------------------------------------------


def make_base(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    """A frozen layer to adapt."""
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT, bias=bias) if kind == "linear" else Conv1D(D_OUT, D_IN)
    return base.to(dtype).requires_grad_(False)


def make_layer(
    kind: str = "linear",
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    layer_class: type[GivaLinear] = GivaLinear,
) -> GivaLinear:
    """A layer whose vectors are away from their start, so that a failure shows."""
    rng = np.random.default_rng(1)
    A = np.linalg.qr(rng.normal(size=(D_IN, R)))[0].T.astype(np.float32)
    B = np.linalg.qr(rng.normal(size=(D_OUT, R)))[0].astype(np.float32)
    layer = layer_class(make_base(kind, dtype, bias), A, B, dropout)
    with torch.no_grad():
        layer.lambda_o.copy_(torch.tensor(rng.normal(size=D_OUT)))
        layer.lambda_s.copy_(torch.tensor(rng.normal(size=R)))
    if residual:
        layer.residual = torch.tensor(rng.normal(size=(D_OUT, R)), dtype=torch.float32)
    return layer
