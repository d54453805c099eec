"""Plain modules to adapt, with bases for them: shapes only, all unequal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from giva_core.types import Bases, BasesSet, LayerShape

HIDDEN, INNER, VOCAB, LABELS = 6, 10, 13, 3
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


def make_bases(layers: tuple[LayerShape, ...], ranks: tuple[int, ...]) -> BasesSet:
    rng = np.random.default_rng(0)
    made = {
        layer.name: Bases(
            np.linalg.qr(rng.normal(size=(layer.d_in, r)))[0].T.astype(np.float32),
            np.linalg.qr(rng.normal(size=(layer.d_out, r)))[0].astype(np.float32),
        )
        for layer, r in zip(layers, ranks, strict=True)
    }
    return BasesSet(made, "rand", "0" * 64)
