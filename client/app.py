"""The Flower ClientApp: message in, message out. All work is done by a `Trainer`.

A handler never raises. The log and the server are told no more than the kind of the error and, where there is one, a
sentence without content. The whole error, which may name files and quote rows, is shown on the site's own stderr, and
only where its operator sets `GIVA_DEBUG=1`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from giva_core import calibration, protocol
from giva_core.config import RunConfig
from giva_core.errors import public_reason
from giva_core.protocol import Payload

from . import backbone, trainer
from .site import local_config, site_settings
from .trainer import Trainer

#: Flower reserves the codes below 100.
SITE_ERROR = 100

log = logging.getLogger("giva.client")
app = ClientApp()
Handler = Callable[[Payload, Trainer], Payload]


def to_content(payload: Payload) -> RecordDict:
    """A payload as Flower records."""
    arrays = ArrayRecord({name: Array(array) for name, array in payload.arrays.items()})
    return RecordDict({"arrays": arrays, "values": ConfigRecord(dict(payload.values))})


def from_content(content: RecordDict) -> Payload:
    """The inverse of `to_content`."""
    arrays = {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}
    values = {name: value for record in content.config_records.values() for name, value in record.items()}
    return Payload(arrays, values)  # type: ignore[arg-type]


def answer(message: Message, context: Context, handler: Handler) -> Message:
    """Let `handler` answer; a failure becomes an error reply without content."""
    try:
        config = RunConfig.from_flat(context.run_config)
        settings = site_settings(config, context.node_config)
        site = trainer.get_trainer(settings, local_config(config, context.node_config))
        return Message(to_content(handler(from_content(message.content), site)), reply_to=message)
    except Exception as error:  # whatever it is, it must not reach the network with its text
        reason = public_reason(error)
        log.error("%s failed: %s", message.metadata.message_type, reason)
        if os.environ.get("GIVA_DEBUG") == "1":
            traceback.print_exception(error, file=sys.stderr)
        return Message(Error(SITE_ERROR, reason), reply_to=message)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Introduce the site."""
    return answer(message, context, lambda request, site: site.hello().to_payload())


@app.query("state")
def state(message: Message, context: Context) -> Message:
    """Send the starting values of the head."""
    return answer(message, context, _state)


@app.train("calibrate")
def calibrate(message: Message, context: Context) -> Message:
    """Sketch the calibration gradient."""

    def handler(request: Payload, site: Trainer) -> Payload:
        _count_question(request, site, context)
        return _calibrate(request, site)

    return answer(message, context, handler)


@app.train("bases")
def bases(message: Message, context: Context) -> Message:
    """Build the bases and prove them by their digest."""
    return answer(message, context, _bases)


@app.train("head")
def head(message: Message, context: Context) -> Message:
    """Train the head alone."""
    return answer(message, context, _train)


@app.train("round")
def train(message: Message, context: Context) -> Message:
    """Train the vectors and the head."""
    return answer(message, context, _train)


@app.evaluate("round")
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global arrays."""
    return answer(message, context, _evaluate)


@app.query("finish")
def finish(message: Message, context: Context) -> Message:
    """Let go of the model."""
    trainer.drop_trainers()
    backbone.drop_backbones()
    return Message(to_content(Payload()), reply_to=message)


# -- payload in, payload out ------------------------------------------------------------------------------------------


def _state(request: Payload, site: Trainer) -> Payload:
    arrays = site.initial_state()
    return Payload({"state": protocol.pack(arrays, list(arrays))})


def _count_question(request: Payload, site: Trainer, context: Context) -> None:
    """Let the site's policy count the calibration questions of this run; one that comes again is the same question."""
    if site.policy is None:
        return
    stage = calibration.STAGES[request.text("stage")].name
    digest = hashlib.sha256(request.text("previous").encode())
    for name, array in sorted(request.arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    asked = context.state.config_records.get("calibration", ConfigRecord())
    questions = sorted({*cast(list[str], asked.get(stage, [])), digest.hexdigest()})
    site.policy.check_question(stage, len(questions), site.config.giva)
    asked[stage] = questions
    context.state["calibration"] = asked


def _calibrate(request: Payload, site: Trainer) -> Payload:
    schema, giva = site.schema, site.config.giva
    stage = calibration.STAGES[request.text("stage")]
    before = request.text("previous")
    previous = (
        protocol.unpack_sketches(
            request, calibration.sketch_shapes(calibration.STAGES[before], schema.layers, schema.ranks, giva)
        )
        if before
        else None
    )
    head_state = protocol.unpack(request.array("state"), schema.state)
    sketches, num_examples, loss = site.calibrate(stage, previous, head_state)
    arrays = protocol.pack_sketches(sketches, [layer.name for layer in schema.layers])
    return Payload(arrays, {"num-examples": num_examples, "loss": loss})


def _bases(request: Payload, site: Trainer) -> Payload:
    sketches, coordinates = protocol.bases_from_payload(request, site.schema, site.config.giva)
    return Payload(values={"bases": site.build_bases(sketches, coordinates)})


def _train(request: Payload, site: Trainer) -> Payload:
    wanted = protocol.train_from_payload(request, site.schema)
    return protocol.update_to_payload(site.train(wanted), wanted.train_names)


def _evaluate(request: Payload, site: Trainer) -> Payload:
    arrays = protocol.global_from_payload(request, site.schema)
    return protocol.evaluation_to_payload(site.evaluate(arrays, request.text("bases")))
