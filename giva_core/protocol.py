"""What server and site say to each other, apart from any transport.

A message is a `Payload`: a few named arrays and a few scalars, packed as `packing` and `wire` have it.

| kind | server → site | site → server |
|---|---|---|
| `query.hello` | digest of the run's configuration | site name, example counts, schema, digests, versions |
| `query.state` | – | the starting values of head (and other method's matrices) |
| `train.head` | global arrays | trained head, example count, steps, mean loss |
| `train.calibrate` | pass, aggregate of the pass before | sketch codes, example count, mean loss |
| `train.bases` | aggregate sketch | digest of the bases built from it |
| `train.round` | global arrays, which vectors to train | trained arrays, example count, steps, mean loss |
| the same, and `train.head` | whether to evaluate these arrays first | an evaluation as well, its names prefixed |
| `evaluate.round` | global arrays | example count, mean loss, metrics (and counts, where the run shares them) |
| `query.finish` | – | – |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import calibration, wire
from .aggregate import initial_vectors
from .calibration import Sketches
from .config import GivaConfig
from .errors import ProtocolError
from .factored import residual_columns, residual_shapes
from .packing import EXPONENT_FLOOR as EXPONENT_FLOOR
from .packing import EXPONENT_LIMIT as EXPONENT_LIMIT
from .packing import Payload as Payload
from .packing import Shapes
from .packing import Value as Value
from .packing import arrays_digest as arrays_digest
from .packing import pack as pack
from .packing import pack_sketches as pack_sketches
from .packing import unpack as unpack
from .packing import unpack_sketches as unpack_sketches
from .sites import SITE_NAME as SITE_NAME
from .types import Arrays, ClientUpdate, LayerShape, ModelSchema, SiteEvaluation
from .wire import PLAIN, Coding

#: Raised with every change of a message's form; the server turns away sites of another version.
PROTOCOL_VERSION = 4

HELLO, STATE, FINISH = "query.hello", "query.state", "query.finish"
HEAD, CALIBRATE, BASES, ROUND = "train.head", "train.calibrate", "train.bases", "train.round"
EVALUATE = "evaluate.round"


@dataclass(frozen=True)
class Hello:
    """How a site introduces itself.

    Attributes:
        site: Its name.
        num_train: Training examples after filtering.
        num_eval: Evaluation examples.
        schema: What its model trains; equal at every site.
        model_digest: SHA-256 of the model below the head: weights, settings, tokenizer; equal at every site.
        state_digest: SHA-256 of the starting values of everything trained but the vectors; equal at every site.
        config_digest: SHA-256 of the agreed settings.
        versions: Library versions, as text.
        device: Type of the device it trains on.
        frozen_digest: SHA-256 of what the method froze by itself, of seed or weights; empty where it has nothing such.
    """

    site: str
    num_train: int
    num_eval: int
    schema: ModelSchema
    model_digest: str
    state_digest: str
    config_digest: str
    versions: str
    device: str
    frozen_digest: str = ""

    def to_payload(self) -> Payload:
        """As a message."""
        schema = {
            "layers": [
                [s.name, s.d_out, s.d_in, r] for s, r in zip(self.schema.layers, self.schema.ranks, strict=True)
            ],
            "state": {name: list(shape) for name, shape in self.schema.state.items()},
            "adapter": list(self.schema.adapter),
            "form": self.schema.form,
        }
        own = {name: value for name, value in vars(self).items() if name != "schema"}
        return Payload(values={**own, "schema": json.dumps(schema), "protocol": PROTOCOL_VERSION})

    @classmethod
    def from_payload(cls, payload: Payload) -> Hello:
        """From a message; raises ProtocolError where it is malformed or of another protocol version."""
        if (version := payload.integer("protocol")) != PROTOCOL_VERSION:
            raise ProtocolError(
                "a site speaks another protocol version",
                got=version,
                expected=PROTOCOL_VERSION,
                remedy="install the same fedgiva version at server and site",
            )
        try:
            raw = json.loads(payload.text("schema"))
            rows = [(str(name), int(d_out), int(d_in), int(r)) for name, d_out, d_in, r in raw["layers"]]
            state = {str(name): tuple(int(n) for n in shape) for name, shape in raw["state"].items()}
            adapter, form = tuple(str(name) for name in raw["adapter"]), str(raw["form"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ProtocolError("a site's schema cannot be read", got=type(error).__name__) from None
        layers, ranks = tuple(LayerShape(*row[:3]) for row in rows), tuple(row[3] for row in rows)
        schema = ModelSchema(layers, ranks, state, adapter, form)
        if not SITE_NAME.fullmatch(payload.text("site")):
            raise ProtocolError("a site's name has other characters than letters, digits, '.', '_' and '-'")
        return cls(
            site=payload.text("site"),
            num_train=payload.integer("num_train"),
            num_eval=payload.integer("num_eval"),
            schema=schema,
            model_digest=payload.text("model_digest"),
            state_digest=payload.text("state_digest"),
            config_digest=payload.text("config_digest"),
            versions=payload.text("versions"),
            device=payload.text("device"),
            frozen_digest=payload.text("frozen_digest"),
        )


@dataclass(frozen=True)
class TrainRequest:
    """What a site is asked to train.

    Attributes:
        arrays: The global arrays to start from.
        server_round: From 1.
        total_rounds: Rounds of this phase: the learning rate runs over all of them.
        bases_digest: The bases to train on; empty before calibration and for methods without bases.
        train_names: Names of the arrays to train and to send back, in wire order.
        is_head_round: Whether the head alone is trained, before calibration.
        evaluate: Whether to evaluate the global arrays as well, before training from them: one message less a round.
        proximal_mu: Weight of FedProx's proximal term (Li et al., arXiv:1812.06127); 0 for none.
        run: Id of the run, by which a site keeps what rounding took from its updates; empty where nothing is kept.
    """

    arrays: Arrays
    server_round: int
    total_rounds: int
    bases_digest: str
    train_names: tuple[str, ...]
    proximal_mu: float = 0.0
    is_head_round: bool = False
    evaluate: bool = False
    run: str = ""


def coding_of(precision: str, schema: ModelSchema, initial_state: Arrays) -> Coding:
    """The form of a run's numbers; server and sites know the run's start, the sites by having made it themselves."""
    return Coding(precision, {**initial_vectors(schema), **initial_state})


def global_to_payload(
    arrays: Arrays, schema: ModelSchema, bases_digest: str, coding: Coding = PLAIN, is_head: bool = False
) -> Payload:
    """The global arrays as a message: everything trained, residuals where there are any, and a digest where rounded.

    Args:
        arrays: By name.
        schema: What the model has.
        bases_digest: Empty before calibration, when there are no vectors.
        coding: How numbers travel.
        is_head: In head rounds an adapter is at its start, which every site has made by itself: it does not travel.
    """
    columns = residual_columns(arrays)
    shapes = global_shapes(schema, bases_digest, columns)
    sent = _without(schema.adapter, shapes) if is_head else shapes
    message = wire.encode(arrays, list(sent), coding.precision, coding.start)
    values: dict[str, Value] = {"bases": bases_digest, "residual": columns}
    if len(sent) < len(shapes):
        values["head-only"] = True
    if not coding.is_plain:
        values["digest"] = arrays_digest(_decoded(message, shapes, sent, coding))
    return Payload(message, values)


def global_from_payload(payload: Payload, schema: ModelSchema, coding: Coding) -> Arrays:
    """The inverse of `global_to_payload`, but for rounding.

    Args:
        payload: The message.
        schema: What the model has.
        coding: How numbers travel, with the run's start, which what does not travel is still at.

    Raises:
        ProtocolError: The message does not fit the schema, or the site counts from another start than the server.
    """
    shapes = global_shapes(schema, payload.text("bases"), payload.integer("residual"))
    is_head = "head-only" in payload.values and payload.flag("head-only")
    arrays = _decoded(payload.arrays, shapes, _without(schema.adapter, shapes) if is_head else shapes, coding)
    if not coding.is_plain and arrays_digest(arrays) != payload.text("digest"):
        raise ProtocolError(
            "what this site was sent does not come out as the server has it",
            cause="a start of the run that the server does not have",
            remedy="start a new run",
            public="the global arrays have another digest than the server says",
        )
    return arrays


def _without(names: Sequence[str], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    left_out = set(names)
    return {name: shape for name, shape in shapes.items() if name not in left_out}


def _decoded(message: Arrays, shapes: Shapes, sent: Shapes, coding: Coding) -> Arrays:
    """What was sent, and the run's start for the rest, in the order of `shapes`."""
    found = {**coding.start, **wire.decode(message, sent, coding.precision, coding.start)}
    return {name: found[name] for name in shapes}


def global_shapes(schema: ModelSchema, bases_digest: str, columns: int = 0) -> dict[str, tuple[int, ...]]:
    """Shape by name of the global arrays, in wire order: vectors (once there are bases), state, residuals.

    Args:
        schema: What the model has.
        bases_digest: Empty before calibration, when there are no vectors.
        columns: 0 where there is no residual; else as `factored.residual_shapes` has it, and anything for vectors.
    """
    shapes = {**(schema.vector_shapes() if bases_digest else {}), **schema.state}
    return {**shapes, **(residual_shapes(schema, columns) if columns else {})}


def trained_names(schema: ModelSchema, factor: str, bases_digest: str) -> tuple[str, ...]:
    """What is trained and sent back, in wire order.

    Args:
        schema: What the model has.
        factor: `both` vectors and the state; one factor (`lambda_o`, `lambda_s`, `lora_A`, `lora_B`) and the head; or
            the `head` alone.
        bases_digest: Empty before calibration, when there are no vectors.
    """
    if factor == "head":
        return tuple(name for name in schema.state if name not in schema.adapter)
    adapter = set(schema.adapter)
    vectors = schema.vector_shapes() if bases_digest else {}
    resting = {name for name in (*vectors, *adapter) if factor != "both" and factor not in name.split(".")}
    return tuple(name for name in (*vectors, *schema.state) if name not in resting)


def train_to_payload(request: TrainRequest, schema: ModelSchema, factor: str, coding: Coding = PLAIN) -> Payload:
    """A request to train as a message."""
    payload = global_to_payload(request.arrays, schema, request.bases_digest, coding, factor == "head")
    values: dict[str, Value] = {
        "server-round": request.server_round,
        "total-rounds": request.total_rounds,
        "factor": factor,
        "proximal-mu": request.proximal_mu,
        "evaluate": request.evaluate,
        **({"run": request.run} if request.run else {}),
    }
    return Payload(payload.arrays, {**payload.values, **values})


def train_from_payload(payload: Payload, schema: ModelSchema, coding: Coding) -> TrainRequest:
    """The inverse of `train_to_payload`."""
    digest = payload.text("bases")
    return TrainRequest(
        arrays=global_from_payload(payload, schema, coding),
        server_round=payload.integer("server-round"),
        total_rounds=payload.integer("total-rounds"),
        bases_digest=digest,
        train_names=trained_names(schema, payload.text("factor"), digest),
        proximal_mu=payload.number("proximal-mu"),
        is_head_round=payload.text("factor") == "head",
        evaluate=payload.flag("evaluate"),
        run=payload.text("run") if "run" in payload.values else "",
    )


def bases_to_payload(sketches: Sketches, coordinates: Sketches | None, schema: ModelSchema) -> Payload:
    """The federation's sketch, from which every site builds the bases, as a message; empty for random bases."""
    if not sketches:
        return Payload()
    names = [layer.name for layer in schema.layers]
    arrays = pack_sketches(sketches, names)
    if coordinates is not None:
        arrays.update({f"coordinates.{name}": array for name, array in pack_sketches(coordinates, names).items()})
    return Payload(arrays)


def bases_from_payload(payload: Payload, schema: ModelSchema, giva: GivaConfig) -> tuple[Sketches, Sketches | None]:
    """The inverse of `bases_to_payload`."""
    if giva.bases == "random":
        return {}, None

    def read(stage: str, source: Payload) -> Sketches:
        shapes = calibration.sketch_shapes(calibration.STAGES[stage], schema.layers, schema.ranks, giva)
        return unpack_sketches(source, shapes)

    prefix = "coordinates."
    extra = {name.removeprefix(prefix): array for name, array in payload.arrays.items() if name.startswith(prefix)}
    return read("range", payload), (read("coordinates", Payload(extra)) if extra else None)


def update_to_payload(
    update: ClientUpdate, names: Sequence[str], coding: Coding = PLAIN, origin: Arrays | None = None
) -> Payload:
    """A site's update as a message.

    Args:
        update: The update.
        names: The wire order.
        coding: How numbers travel.
        origin: The global arrays as the site got them, which rounded numbers count from.
    """
    values: dict[str, Value] = {} if coding.is_plain else {"digest": arrays_digest(origin or {})}
    return Payload(
        wire.encode(update.arrays, names, coding.precision, origin or {}),
        {
            **values,
            "num-examples": update.num_examples,
            "num-steps": update.num_steps,
            "train-loss": update.train_loss,
            "bases": update.bases_digest,
            "seconds": update.seconds,
        },
    )


def update_from_payload(
    payload: Payload, shapes: Shapes, coding: Coding = PLAIN, origin: Arrays | None = None, digest: str = ""
) -> ClientUpdate:
    """The inverse of `update_to_payload`, but for rounding.

    Args:
        payload: The message.
        shapes: Shape by name of what was trained, in wire order.
        coding: How numbers travel.
        origin: What the server adds differences to: its own arrays, of which the site got a rounded form.
        digest: That of the rounded form.

    Raises:
        ProtocolError: The message does not fit, or its differences count from other arrays.
    """
    if not coding.is_plain and payload.text("digest") != digest:
        raise ProtocolError(
            "an update counts from other arrays than were sent",
            got=f"{payload.text('digest')[:12]}…",
            expected=f"{digest[:12]}…",
        )
    return ClientUpdate(
        arrays=wire.decode(payload.arrays, shapes, coding.precision, origin or {}),
        num_examples=payload.integer("num-examples"),
        num_steps=payload.integer("num-steps"),
        train_loss=payload.number("train-loss"),
        bases_digest=payload.text("bases"),
        seconds=payload.number("seconds"),
    )


def evaluation_to_payload(evaluation: SiteEvaluation) -> Payload:
    """A site's evaluation as a message."""
    metrics: dict[str, Value] = {f"metric.{name}": float(value) for name, value in evaluation.metrics.items()}
    counts = {f"count.{name}": np.asarray(value) for name, value in evaluation.counts.items()}
    return Payload(counts, {"num-examples": evaluation.num_examples, "loss": evaluation.loss, **metrics})


def evaluation_from_payload(payload: Payload) -> SiteEvaluation:
    """The inverse of `evaluation_to_payload`."""
    metrics = {
        name.removeprefix("metric."): payload.number(name) for name in payload.values if name.startswith("metric.")
    }
    counts = {name.removeprefix("count."): array for name, array in payload.arrays.items() if name.startswith("count.")}
    return SiteEvaluation(payload.integer("num-examples"), payload.number("loss"), metrics, counts)


_EVALUATION = "evaluation."


def with_evaluation(payload: Payload, evaluation: Payload | str) -> Payload:
    """An answer to a request to train, and beside it an evaluation's message, or the public reason for its absence."""
    if isinstance(evaluation, str):
        return Payload(payload.arrays, {**payload.values, f"{_EVALUATION}failed": evaluation})
    arrays = {f"{_EVALUATION}{name}": array for name, array in evaluation.arrays.items()}
    values = {f"{_EVALUATION}{name}": value for name, value in evaluation.values.items()}
    return Payload({**payload.arrays, **arrays}, {**payload.values, **values})


def without_update(payload: Payload) -> Payload:
    """An answer to a request to train without what was trained: its scalars, and the evaluation where it has one."""
    arrays = {name: array for name, array in payload.arrays.items() if name.startswith(_EVALUATION)}
    return Payload(arrays, payload.values)


def evaluation_beside(payload: Payload) -> Payload | str | None:
    """The inverse of `with_evaluation`; None where the answer has no evaluation."""
    arrays = {n.removeprefix(_EVALUATION): a for n, a in payload.arrays.items() if n.startswith(_EVALUATION)}
    values = {n.removeprefix(_EVALUATION): v for n, v in payload.values.items() if n.startswith(_EVALUATION)}
    if "failed" in values:
        return str(values["failed"])
    return Payload(arrays, values) if values else None
