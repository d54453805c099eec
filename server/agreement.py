"""How the sites come to the run's bases: calibration passes, their mean, a digest that proves they agree."""

from __future__ import annotations

import time
from dataclasses import replace

from giva_core import bases, calibration, protocol
from giva_core.calibration import Sketches, Stage
from giva_core.errors import BasesError
from giva_core.protocol import Payload
from giva_core.types import Arrays, BasesSet, SiteRecord

from .exchange import site_record
from .session import Session, mean
from .sketch_shelf import KEPT_SKETCH_BYTES, SketchShelf, sketch_bytes
from .sketches import SketchIntake, calibration_question, sketches_from_arrays, sketches_to_arrays


def agree_on_bases(session: Session, arrays: Arrays) -> tuple[BasesSet, Payload]:
    """Agree on the bases; a resumed run keeps those that it began with.

    Args:
        session: The run.
        arrays: The head to calibrate with.

    Returns:
        The bases, and the message from which a site builds them.

    Raises:
        QuorumError: Too few sites took part.
        BasesError: The stored sketches no longer give the bases that the run began with.
    """
    config, store, run_id = session.config, session.store, session.run_id
    known = store.run(run_id).facts.get("bases_digest")
    if known is not None:
        sketches, coordinates = sketches_from_arrays(store.load_blob(run_id, "sketches"))
    else:
        sketches, coordinates = _calibrate(session, arrays)
        store.save_blob(run_id, "sketches", sketches_to_arrays(sketches, coordinates))
    started = time.monotonic()
    schema = session.schema
    made = bases.build_bases(schema.layers, schema.ranks, sketches, config.bases, coordinates)
    if known not in (None, made.digest):
        raise BasesError(
            "the bases built from the run's stored sketches are not those that it began with",
            got=f"{made.digest[:12]}…",
            expected=f"{str(known)[:12]}…",
            cause="another version of this software computes them differently",
            remedy="finish the run with the version that began it",
        )
    message = protocol.bases_to_payload(sketches, coordinates, schema)
    records = send_bases(session, session.members.nodes(), message, made.digest)
    session.record("bases", session.next_number("bases"), records, started)
    session.need(config.rounds.quorum, records, "hold the run's bases")
    store.set_facts(run_id, {"bases_digest": made.digest})
    return made, message


def send_bases(session: Session, nodes: dict[str, int], message: Payload, wanted: str) -> list[SiteRecord]:
    """Broadcast the aggregate sketch; a site that builds other bases from it is taken out of the run."""
    records = []
    for answer in session.ask(nodes, protocol.BASES, message, "bases"):
        record = site_record(answer)
        if answer.payload is None:
            session.members.forget(answer.site)
        elif (digest := str(answer.payload.values.get("bases"))) != wanted:
            reason = (
                f"bases digest {digest[:12]}… but the run uses {wanted[:12]}…; its machine computes differently: "
                "run `giva bases self-test` there"
            )
            record = replace(record, status="refused", reason=reason)
            session.members.drop(answer.site, reason)
        records.append(record)
    return records


def _calibrate(session: Session, arrays: Arrays) -> tuple[Sketches, Sketches | None]:
    """All passes of the plan; returns the aggregate Y, and Z where the init needs it."""
    rounds, giva, schema, members = session.config.rounds, session.config.bases, session.schema, session.members

    def one_pass(number: int, stage: Stage, previous: tuple[Stage, Sketches] | None) -> Sketches:
        started = time.monotonic()
        question = calibration_question(stage, previous, arrays, schema)
        nodes, hellos = members.active(rounds.min_sites), members.hellos()
        shapes = calibration.sketch_shapes(stage, schema.layers, schema.ranks, giva)
        with SketchShelf(session.store.run_folder(session.run_id), shapes, KEPT_SKETCH_BYTES) as shelf:
            shelf.check_room(len(nodes), giva.sketch_bits)
            intake = SketchIntake(hellos, giva, shelf)
            size = sketch_bytes(shapes, giva.sketch_bits)
            answers = session.ask(
                nodes, protocol.CALIBRATE, question, f"calibrate-{number}", take=intake.take, answer_bytes=size
            )
            heard = intake.heard(answers)
            session.need(rounds.quorum, heard.records, f"answered calibration pass {number}")
            aggregate = heard.mean(giva.sketch_bits)
        total, loss = sum(heard.weights), mean(heard.losses, heard.weights)
        session.record("calibrate", number, heard.records, started, total_examples=total, train_loss=loss)
        return aggregate

    return calibration.run_passes(giva, one_pass)
