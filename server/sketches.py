"""The server's side of calibration: a pass's question, what comes back, its mean, and its form in the run store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from giva_core import bases, calibration, protocol
from giva_core.calibration import Sketches, Stage
from giva_core.config import GivaConfig
from giva_core.errors import GivaError, UpdateError
from giva_core.protocol import Hello, Payload
from giva_core.types import Arrays, ModelSchema, QuantisedSketch, SiteRecord

from .exchange import Answer, site_record
from .guard import check_sketch_counts

NORM_FACTOR = 100.0  # a site's sketch may be this much larger than the median of the sites'
_LARGEST_NORM = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class HeardSketches:
    """What the sites answered in one pass, in the order of their names.

    Attributes:
        sketches: One mapping by layer for each site that counts.
        weights: Its calibration examples.
        losses: Its mean loss.
        records: One record for every site asked.
    """

    sketches: list[Sketches]
    weights: list[int]
    losses: list[float]
    records: list[SiteRecord]

    def mean(self, bits: int) -> dict[str, QuantisedSketch]:
        """`Σ w_k Y_k / Σ w_k` by layer, requantised: exactly the sketch of the mean gradient, but for rounding."""
        return {
            name: bases.mean_sketch([sketch[name] for sketch in self.sketches], self.weights, bits)
            for name in self.sketches[0]
        }


def calibration_question(
    stage: Stage, previous: tuple[Stage, Sketches] | None, arrays: Arrays, schema: ModelSchema
) -> Payload:
    """What the sites are asked in this pass: the head to calibrate with, and the aggregate of the pass before."""
    question = Payload(
        {"state": protocol.pack(arrays, list(schema.state))},
        {"stage": stage.name, "previous": previous[0].name if previous else ""},
    )
    if previous:
        question.arrays.update(protocol.pack_sketches(previous[1], [layer.name for layer in schema.layers]))
    return question


def read_sketches(
    stage: Stage, answers: Sequence[Answer], hellos: Mapping[str, Hello], schema: ModelSchema, giva: GivaConfig
) -> HeardSketches:
    """Check every answer; one that does not qualify is refused with its reason."""
    shapes = calibration.sketch_shapes(stage, schema.layers, schema.ranks, giva)
    records = {answer.site: site_record(answer) for answer in answers}
    found: dict[str, Sketches] = {}
    for answer in answers:
        if answer.payload is None:
            continue
        try:
            sketches = protocol.unpack_sketches(answer.payload, shapes)
            count, loss = answer.payload.integer("num-examples"), answer.payload.number("loss")
            check_sketch_counts(count, loss, hellos[answer.site], giva)
            found[answer.site] = sketches
            records[answer.site] = replace(records[answer.site], num_examples=count, train_loss=loss)
        except GivaError as error:
            records[answer.site] = replace(records[answer.site], status="refused", reason=str(error))
    for site, reason in _too_large({site: sketch_norm(sketches) for site, sketches in found.items()}).items():
        del found[site]
        records[site] = replace(records[site], status="refused", reason=reason, num_examples=0, train_loss=None)
    counted = [records[site] for site in found]
    return HeardSketches(
        list(found.values()),
        [record.num_examples for record in counted],
        [record.train_loss or 0.0 for record in counted],
        list(records.values()),
    )


def sketch_norm(sketches: Sketches) -> float:
    """`‖Y‖_F` over all layers, from codes and exponents."""
    squares = 0.0
    for sketch in sketches.values():
        columns = np.sum(np.square(sketch.codes, dtype=np.float64), axis=0)
        squares += float(np.sum(np.ldexp(columns, 2 * sketch.exponents)))
    return float(np.sqrt(squares))


def _too_large(norms: Mapping[str, float]) -> dict[str, str]:
    """Reason by site for sketches that would drown the others': the mean is linear, so one could choose the bases.

    With three sites or more the median is the measure; it takes half of the sites to move it. With fewer there is
    nothing to compare with, and only what float32 could not hold is refused.
    """
    middle = median(norms.values()) if len(norms) >= 3 else 0.0
    limit = NORM_FACTOR * middle if middle > 0 else _LARGEST_NORM
    return {
        site: str(
            UpdateError("the sketch is far larger than the other sites'", got=f"{norm:.4g}", expected=f"<= {limit:.4g}")
        )
        for site, norm in norms.items()
        if norm > limit
    }


def sketches_to_arrays(sketches: Sketches, coordinates: Sketches | None) -> Arrays:
    """The aggregate Y, and Z where there is one, as the run store keeps them."""
    arrays: Arrays = {}
    for kind, found in (("Y", sketches), ("Z", coordinates or {})):
        for layer, sketch in found.items():
            arrays[f"{kind}/{layer}/codes"] = sketch.codes
            arrays[f"{kind}/{layer}/exponents"] = sketch.exponents
    return arrays


def sketches_from_arrays(arrays: Arrays) -> tuple[Sketches, Sketches | None]:
    """The inverse of `sketches_to_arrays`."""
    found: dict[str, dict[str, QuantisedSketch]] = {"Y": {}, "Z": {}}
    for name in arrays:
        kind, layer, part = name.split("/")
        if part == "codes":
            found[kind][layer] = QuantisedSketch(arrays[name], arrays[f"{kind}/{layer}/exponents"])
    return found["Y"], found["Z"] or None
