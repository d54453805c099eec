"""The server's side of calibration: a pass's question, what comes back, its mean, and its form in the run store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from giva_core import bases, protocol
from giva_core.calibration import Sketches, Stage
from giva_core.config import GivaConfig
from giva_core.errors import GivaError, UpdateError
from giva_core.protocol import Hello, Payload
from giva_core.types import Arrays, ModelSchema, QuantisedSketch, SiteRecord

from .exchange import Answer, site_record
from .guard import check_sketch_counts
from .sketch_shelf import SketchShelf

NORM_FACTOR = 100.0  # a site's sketch may be this much larger than the median of the sites'
_LARGEST_NORM = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class HeardSketches:
    """What the sites answered in one pass.

    Attributes:
        sites: Those that count, in the order of their names.
        weights: Calibration examples of each.
        losses: Mean loss of each.
        records: One record for every site asked.
        shelf: Where their sketches are.
    """

    sites: list[str]
    weights: list[int]
    losses: list[float]
    records: list[SiteRecord]
    shelf: SketchShelf

    def mean(self, bits: int) -> dict[str, QuantisedSketch]:
        """`Σ w_k Y_k / Σ w_k` by layer, requantised: exactly the sketch of the mean gradient, but for rounding."""
        return {
            name: bases.mean_sketch((self.shelf.layer(site, name) for site in self.sites), self.weights, bits)
            for name in self.shelf.shapes
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


@dataclass
class SketchIntake:
    """Takes the answers to a calibration pass as they come: each is checked, and its sketches put on the shelf.

    Attributes:
        hellos: What the sites said of themselves.
        giva: What they were asked for.
        shelf: Where their sketches go.
    """

    hellos: Mapping[str, Hello]
    giva: GivaConfig
    shelf: SketchShelf
    _taken: dict[str, _Taken] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)

    def take(self, answer: Answer) -> Answer:
        """Read an answer; returns it without its payload.

        Raises:
            StoreError: The sketches cannot be stored, which is no fault of the site's.
        """
        if answer.payload is None:
            return answer
        try:
            sketches = protocol.unpack_sketches(answer.payload, self.shelf.shapes)
            _check_codes(sketches, self.giva)
            count, loss = answer.payload.integer("num-examples"), answer.payload.number("loss")
            check_sketch_counts(count, loss, self.hellos[answer.site], self.giva)
        except GivaError as error:
            self._refused[answer.site] = str(error)
        else:
            self.shelf.put(answer.site, sketches)
            self._taken[answer.site] = _Taken(sketch_norm(sketches), count, loss)
        return replace(answer, payload=None)

    def heard(self, answers: Sequence[Answer]) -> HeardSketches:
        """What counts, once all answers are in; they were all taken."""
        too_large = _too_large({site: taken.norm for site, taken in self._taken.items()})
        refused = {**self._refused, **too_large}
        sites = sorted(self._taken.keys() - too_large.keys())
        counted = {site: self._taken[site] for site in sites}
        records = []
        for answer in answers:
            record = site_record(answer)
            if answer.site in refused:
                record = replace(record, status="refused", reason=refused[answer.site])
            elif (taken := counted.get(answer.site)) is not None:
                record = replace(record, num_examples=taken.num_examples, train_loss=taken.loss)
            records.append(record)
        weights, losses = [t.num_examples for t in counted.values()], [t.loss for t in counted.values()]
        return HeardSketches(sites, weights, losses, records, self.shelf)


@dataclass(frozen=True)
class _Taken:
    """What is remembered of an answer whose sketches are on the shelf."""

    norm: float
    num_examples: int
    loss: float


def _check_codes(sketches: Sketches, giva: GivaConfig) -> None:
    """Refuse wider integers than the run asked for, of which a site could fill the server's disk."""
    expected = bases.code_type(giva.sketch_bits)
    for sketch in sketches.values():
        if sketch.codes.dtype != expected:
            raise UpdateError("the sketch has wider integers than asked for", got=sketch.codes.dtype, expected=expected)


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
