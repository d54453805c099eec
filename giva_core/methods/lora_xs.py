"""LoRA-XS and Fed-SB: one r × r matrix is trained between two frozen bases, so the mean over sites is exact.

    ΔW = B R A,    R (r, r) = 0 at the start;   Σ w_k B R_k A = B R̄ A

- `lora_xs.bases = weight`: `W ≈ U_r Σ_r V_rᵀ`, `A = V_rᵀ`, `B = U_r Σ_r`. Bałazy et al., "LoRA-XS: Low-Rank Adaptation
  with Extremely Small Number of Parameters", arXiv:2405.17604, equation 2. Made of W by exact arithmetic
  (`weight_bases`): nothing travels.
- `lora_xs.bases = gradient`: A and B are the leading singular vectors of the gradient, as in LoRA-SB (Ponkshe et al.,
  arXiv:2411.19557) and Fed-SB (Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and
  Performance in (Private) Federated LoRA Fine-Tuning", arXiv:2502.15436). Fed-SB's published code takes that gradient
  from the pooled data of all sites, before it splits them; here it is the federation's, through the same sketches as
  GiVA's bases with the init `topsv` (`calibration`), and their bytes count.

Two things differ from the papers: R starts at 0 instead of N(0, 10⁻¹⁰) or the gradient's singular values, so that
training starts at W itself; and there is no scale alpha / r, which AdamW's learning rate stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import bases, inject
from ..config import RunConfig
from ..layer import GivaLinear
from ..types import Arrays, Bases, LayerShape
from .weight_bases import weight_bases
from .weights import read_weights, weights_frozen

if TYPE_CHECKING:
    from typing import ClassVar


class CoreLinear(GivaLinear):
    """A frozen linear layer plus `ΔW = B R A`; all else is as in `GivaLinear`.

    Attributes:
        core: R, trained, float32 `(r, r)`.
    """

    vectors: ClassVar[tuple[str, ...]] = ("core",)

    core: nn.Parameter

    def _start(self) -> None:
        r = self.B.shape[1]
        self.core = nn.Parameter(torch.zeros(r, r, device=self.B.device, dtype=torch.float32))

    def coefficients(self) -> Tensor:
        """`M = B R`, float32 `(d_out, r)`, so that ΔW = M A."""
        return self.B @ self.core


def put_in(
    model: nn.Module, layers: Sequence[LayerShape], ranks: Sequence[int], config: RunConfig
) -> tuple[tuple[str, ...], Arrays]:
    """Put LoRA-XS layers of rank `giva.rank` on the weight's singular vectors into `model`, in place.

    Result as of `lora.put_in`.

    Raises:
        BasesError: A weight has a lower rank.
    """
    made, values = weight_bases(layers, ranks, read_weights(model, layers), config.giva.seed)
    scaled = {name: Bases(pair.A, pair.B * values[name]) for name, pair in made.layers.items()}
    made = replace(made, layers=scaled, digest=bases.bases_digest(scaled, made.init))
    inject.inject(model, made, config.giva.dropout, kind=CoreLinear)
    return tuple(inject.read_vectors(model)), weights_frozen(made)
