"""One question in, one answer out: everything a site can be asked, independent of what carries the messages.

In a simulation the ClientApp calls this in its own process; at a deployed site only the worker does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from giva_core import calibration, protocol, wire
from giva_core.config import RunConfig
from giva_core.errors import ProtocolError, public_reason
from giva_core.protocol import Payload, TrainRequest
from giva_core.types import ClientUpdate
from giva_core.wire import Coding

from . import backbone, trainer
from .feedback import Feedback
from .questions import Questions, question_digest
from .site import SiteSettings
from .trainer import Trainer
from .training import OnStep

Handler = Callable[[Payload, Trainer], Payload]

log = logging.getLogger("giva.client")


def answer(
    kind: str,
    request: Payload,
    site: SiteSettings,
    config: RunConfig,
    *,
    questions: Questions | None = None,
    on_step: OnStep = lambda step, steps: None,
) -> Payload:
    """Answer one message.

    Args:
        kind: What is asked, as in `giva_core.protocol`.
        request: The question.
        site: The site.
        config: The run's configuration, with the site's own model folder.
        questions: What was asked before in this run; None where the site has no policy to hold it against.
        on_step: Told of every optimizer step.

    Raises:
        GivaError: The question does not fit the run or the site's policy, or the work failed.
    """
    if kind == protocol.FINISH:
        return Payload()  # what is loaded is let go by who owns the process: a simulation does so, a worker keeps it
    if kind not in _HANDLERS:
        raise ProtocolError("there is no such kind of message", got=repr(kind[:40]), public="unknown kind of message")
    handler = _HANDLERS[kind]
    own = trainer.get_trainer(site, config)
    own.on_step = on_step
    if site.policy and questions:
        _count(kind, request, own, questions)
    return handler(request, own)


def let_go() -> None:
    """Forget models and rows."""
    trainer.drop_trainers()
    backbone.drop_backbones()


def _count(kind: str, request: Payload, site: Trainer, questions: Questions) -> None:
    """Hold the different questions of this run, with this one, against the site's policy."""
    if site.policy is None:
        return
    questions.pin(site.config.digest())
    # a round that is tried again may come without the evaluation that it has by then
    values = {name: value for name, value in request.values.items() if name != "evaluate"}
    digest = question_digest(kind, Payload(request.arrays, values))
    if kind == protocol.CALIBRATE and not site.config.is_calibrated:
        raise ProtocolError(
            "a calibration question in a run that has none",
            got=f"method = {site.config.method}, giva.bases = {site.config.giva.bases}",
            public="this run has no calibration",
        )
    if kind == protocol.CALIBRATE:
        stage = _stage(request).name
        site.policy.check_calibration(stage, questions.with_one_more(stage, digest), site.config.bases)
    elif kind in (protocol.HEAD, protocol.ROUND):
        stage = "train"
        site.policy.check_rounds(questions.with_one_more(stage, digest))
    elif kind == protocol.EVALUATE:
        stage = "evaluate"
        site.policy.check_rounds(questions.with_one_more(stage, digest), "evaluations")
    else:
        return
    questions.remember(stage, digest)


def _stage(request: Payload, name: str = "stage") -> calibration.Stage:
    wanted = request.text(name)
    if wanted not in calibration.STAGES:
        raise ProtocolError("there is no such pass", got=repr(wanted[:40]), public="unknown calibration pass")
    return calibration.STAGES[wanted]


# -- payload in, payload out ------------------------------------------------------------------------------------------


def _hello(request: Payload, site: Trainer) -> Payload:
    spoken = request.integer("protocol")
    if spoken != protocol.PROTOCOL_VERSION:
        raise ProtocolError(
            "the server speaks another protocol version",
            got=spoken,
            expected=protocol.PROTOCOL_VERSION,
            remedy="install the same fedgiva version at server and site",
            public=f"the server speaks protocol {spoken}, this site {protocol.PROTOCOL_VERSION}",
        )
    return site.hello().to_payload()


def _state(request: Payload, site: Trainer) -> Payload:
    arrays = site.initial_state()
    return Payload({"state": protocol.pack(arrays, list(arrays))})


def _calibrate(request: Payload, site: Trainer) -> Payload:
    schema, giva = site.schema, site.config.bases
    previous = None
    if request.text("previous"):
        shapes = calibration.sketch_shapes(_stage(request, "previous"), schema.layers, schema.ranks, giva)
        previous = protocol.unpack_sketches(request, shapes)
    head_state = protocol.unpack(request.array("state"), schema.state)
    sketches, num_examples, loss = site.calibrate(_stage(request), previous, head_state)
    arrays = protocol.pack_sketches(sketches, [layer.name for layer in schema.layers])
    return Payload(arrays, {"num-examples": num_examples, "loss": loss})


def _bases(request: Payload, site: Trainer) -> Payload:
    sketches, coordinates = protocol.bases_from_payload(request, site.schema, site.config.bases)
    return Payload(values={"bases": site.build_bases(sketches, coordinates)})


def _train(request: Payload, site: Trainer) -> Payload:
    coding = _coding(site)
    wanted = protocol.train_from_payload(request, site.schema, coding)
    evaluation: Payload | str | None = None
    if wanted.evaluate:
        try:
            evaluation = protocol.evaluation_to_payload(site.evaluate(wanted.arrays, wanted.bases_digest))
        except Exception as error:  # the site can train all the same
            evaluation = public_reason(error)
            log.error("the evaluation beside %s failed: %s", protocol.ROUND, evaluation)
    update = site.train(wanted)
    if coding.precision == "int8":
        message = _with_feedback(update, wanted, coding, site)
    else:
        message = protocol.update_to_payload(update, wanted.train_names, coding, wanted.arrays)
    return message if evaluation is None else protocol.with_evaluation(message, evaluation)


def _with_feedback(update: ClientUpdate, wanted: TrainRequest, coding: Coding, site: Trainer) -> Payload:
    """The update's message, with what rounding took from the one before; what it takes from this one is kept."""
    feedback = Feedback.of(wanted.run, site.name, wanted.server_round, wanted.is_head_round)
    lost = feedback.before()
    names = wanted.train_names
    own = {name: update.arrays[name] for name in names}
    # what another run of the same name lost fits by chance or not at all
    fits = {name: name in lost and lost[name].shape == array.shape for name, array in own.items()}
    arrays = {name: array + lost[name] if fits[name] else array for name, array in own.items()}
    message = protocol.update_to_payload(replace(update, arrays=arrays), names, coding, wanted.arrays)
    shapes = {name: arrays[name].shape for name in names}
    heard = wire.decode(message.arrays, shapes, coding.precision, wanted.arrays)
    feedback.keep({**lost, **{name: arrays[name] - heard[name] for name in names}})
    return message


def _coding(site: Trainer) -> Coding:
    return protocol.coding_of(site.config.wire.precision, site.schema, site.initial_state())


def _evaluate(request: Payload, site: Trainer) -> Payload:
    arrays = protocol.global_from_payload(request, site.schema, _coding(site))
    return protocol.evaluation_to_payload(site.evaluate(arrays, request.text("bases")))


_HANDLERS: dict[str, Handler] = {
    protocol.HELLO: _hello,
    protocol.STATE: _state,
    protocol.CALIBRATE: _calibrate,
    protocol.BASES: _bases,
    protocol.HEAD: _train,
    protocol.ROUND: _train,
    protocol.EVALUATE: _evaluate,
}
