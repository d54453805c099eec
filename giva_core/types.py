"""The value objects that flow between the parts. Frozen, framework-free: numpy arrays in, numpy arrays out.

Notation follows Gangwar et al., "GiVA: Gradient-Informed Bases for Vector-Based Adaptation", arXiv:2604.21901: a
layer's weight `W` is `(d_out, d_in)`, `A` is `(r, d_in)`, `B` is `(d_out, r)`, and the trained vectors are `lambda_o`
`(d_out,)` and `lambda_s` `(r,)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

#: Arrays by parameter name, e.g. `encoder.layer.0.attention.self.query.lambda_o` or `classifier.weight`.
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class LayerShape:
    """One adapted linear layer.

    Attributes:
        name: The module's name inside the model.
        d_out: Output features.
        d_in: Input features.
    """

    name: str
    d_out: int
    d_in: int

    def effective_rank(self, rank: int, init: str = "rand") -> int:
        """`rank`, clipped to min(d_out, d_in), or to half of that for `secsv`, which needs 2r singular vectors."""
        limit = min(self.d_out, self.d_in)
        return min(rank, limit // 2 if init == "secsv" else limit)


@dataclass(frozen=True)
class QuantisedSketch:
    """A sketch as it travels: `value[:, j] = codes[:, j] * 2**exponents[j]`.

    Attributes:
        codes: Integers `(n, q)`, int8, int16 or int32; n is d_in for `Y` and d_out for `Z`.
        exponents: int32 `(q,)`, one power of two for each column.
    """

    codes: np.ndarray
    exponents: np.ndarray


@dataclass(frozen=True)
class Bases:
    """The frozen bases of one layer.

    Attributes:
        A: float32 `(r, d_in)`, orthonormal rows.
        B: float32 `(d_out, r)`; orthonormal columns except under `rowalign`.
    """

    A: np.ndarray
    B: np.ndarray


@dataclass(frozen=True)
class BasesSet:
    """The bases of all adapted layers and the digest that proves that two sites hold the same ones.

    Attributes:
        layers: Bases by layer name, in model order.
        init: How B was made: `rand`, `topsv`, `secsv` or `rowalign`.
        digest: SHA-256 (hex) over names, shapes and float32 bytes in the order of the sorted layer names.
    """

    layers: Mapping[str, Bases]
    init: str
    digest: str


@dataclass(frozen=True)
class ModelSchema:
    """What a model trains and sends; equal at every site, or the sites do not fit together.

    Attributes:
        layers: The adapted layers, in model order; empty for methods without bases.
        ranks: The effective rank of each of them.
        state: Shape by name of every array that is trained besides the vectors (head, or another method's matrices).
        adapter: Those names of `state` that are another method's matrices; head rounds leave them alone.
        form: What is trained between the bases: `vectors`, GiVA's two, or `core`, one r × r matrix.
    """

    layers: tuple[LayerShape, ...]
    ranks: tuple[int, ...]
    state: Mapping[str, tuple[int, ...]]
    adapter: tuple[str, ...] = ()
    form: str = "vectors"

    def vector_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name of what every layer trains between its bases: `lambda_o` and `lambda_s`, or `core`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, r in zip(self.layers, self.ranks, strict=True):
            if self.form == "core":
                shapes[f"{layer.name}.core"] = (r, r)
                continue
            shapes[f"{layer.name}.lambda_o"] = (layer.d_out,)
            shapes[f"{layer.name}.lambda_s"] = (r,)
        return shapes


@dataclass(frozen=True)
class ClientUpdate:
    """What a site sends after local training.

    Attributes:
        arrays: The trained arrays, float32.
        num_examples: Training examples after filtering (not batches): the weight of the update.
        num_steps: Optimizer steps taken.
        train_loss: Mean loss over the local steps.
        bases_digest: Digest of the bases the update was trained on; empty where the method has none.
        seconds: Time spent training.
    """

    arrays: Arrays
    num_examples: int
    num_steps: int
    train_loss: float
    bases_digest: str
    seconds: float = 0.0


@dataclass(frozen=True)
class SiteEvaluation:
    """What a site reports after evaluation: means, and counts only where the run's configuration shares them.

    Attributes:
        num_examples: Examples evaluated.
        loss: Mean loss.
        metrics: Metric by name.
        counts: Sufficient statistics of the metrics, empty unless `task.share-counts` is on.
    """

    num_examples: int
    loss: float
    metrics: Mapping[str, float]
    counts: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteRecord:
    """One site in one round, as the run store keeps it.

    Attributes:
        site: The site's name.
        status: `ok`, `refused` (the guard turned the update away), `failed` (the site answered with an error) or
            `missing` (no answer before the deadline).
        reason: Why, for everything but `ok`.
        num_examples: Training examples behind the update.
        num_steps: Optimizer steps taken.
        train_loss: Mean local training loss.
        train_seconds: Seconds of local training.
        eval_examples: Evaluation examples.
        eval_loss: Mean evaluation loss of the new global state at this site.
        metrics: Evaluation metrics at this site.
        bytes_up: Bytes received from the site in this round.
        bytes_down: Bytes sent to it.
    """

    site: str
    status: str
    reason: str = ""
    num_examples: int = 0
    num_steps: int = 0
    train_loss: float | None = None
    train_seconds: float = 0.0
    eval_examples: int = 0
    eval_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class RoundRecord:
    """One finished phase or round of a run.

    Attributes:
        phase: `hello`, `head`, `calibrate`, `bases` or `train`.
        round: From 1 within `head` and `train`; the pass within `calibrate`; for `hello` and `bases` a running number,
            which goes on when sites join or come back.
        sites: One record for each sampled site, sorted by name.
        total_examples: Training examples that counted.
        train_loss: Example-weighted mean of the local training losses.
        eval_loss: Example-weighted mean of the evaluation losses.
        metrics: Totals by name, and the worst site's as `worst_<name>`.
        aggregation_error: `‖Σ w_k ΔW_k − ΔW(mean)‖_F / ‖Σ w_k ΔW_k‖_F`, GiVA only.
        bytes_up: Bytes received from all sites, as serialised.
        bytes_down: Bytes sent to all sites.
        seconds: Wall time of the phase.
    """

    phase: str
    round: int
    sites: tuple[SiteRecord, ...] = ()
    total_examples: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    aggregation_error: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
