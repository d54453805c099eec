"""The run: hello → head rounds → calibration → bases → training rounds → finish, each step checked, stored, resumable.

Flower's own loop waits without limit for lost nodes, averages NaN, and cannot resume. Here every phase has a deadline
and a quorum, every answer passes the guard before it counts, sums run in the order of the sites' names, and nothing of
a round depends on anything but the run's seed and the stored state: a resumed run ends with the same bytes.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flwr.serverapp import Grid

from giva_core import aggregate, bases, calibration, checkpoint, metrics, protocol
from giva_core.calibration import Sketches, Stage
from giva_core.config import RunConfig
from giva_core.errors import GivaError, QuorumError
from giva_core.protocol import Hello, Payload, TrainRequest
from giva_core.types import (
    Arrays,
    BasesSet,
    ClientUpdate,
    ModelSchema,
    RoundRecord,
    SiteEvaluation,
    SiteRecord,
)

from . import guard
from .exchange import Answer, ask, site_record
from .members import Members
from .run_store import RunStore
from .sketches import calibration_question, read_sketches, sketches_from_arrays, sketches_to_arrays
from .strategy import Aggregator, check_finite, make_aggregator

_FINISH_SECONDS = 10.0
_STRATEGY = "strategy:"  # prefix of the strategy's own arrays in a stored state


@dataclass(frozen=True)
class Accepted:
    """Updates that passed the guard, in the order of the sites' names, and every sampled site's record."""

    updates: list[ClientUpdate]
    records: list[SiteRecord]


class Federation:
    """One run on a grid.

    Args:
        grid: Flower's grid, in whatever engine.
        config: The run's configuration.
        store: Where rounds, metrics and states are kept.
        run_id: The run; one that has stored states is continued.
        on_record: Told each finished phase and round.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        store: RunStore,
        run_id: str,
        on_record: Callable[[RoundRecord], None] = lambda record: None,
    ) -> None:
        self.grid, self.config, self.store, self.run_id = grid, config, store, run_id
        self.on_record = on_record
        self.members = Members(grid, config)
        self.aggregator: Aggregator = make_aggregator(config)
        self.arrays: Arrays = {}
        self.residual: Arrays = {}
        self.bases: BasesSet | None = None
        self._bases_message: Payload | None = None

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Carry the run to its end; whatever stops it is written down, and the run can be resumed."""
        with self.store.locked(self.run_id):
            self.store.set_status(self.run_id, "running")
            try:
                self._run()
            except KeyboardInterrupt:
                self.store.set_status(self.run_id, "stopped", "interrupted")
                raise
            except Exception as error:
                reason = str(error) if isinstance(error, GivaError) else f"{type(error).__name__}: {error}"
                self.store.set_status(self.run_id, "failed", reason)
                raise
            self.store.set_status(self.run_id, "completed")

    def _run(self) -> None:
        stored = self.store.last_state(self.run_id)
        self._hello()
        done = {"head": 0, "train": 0}
        if stored is not None:
            done[stored.phase] = stored.round
            self._load(stored.arrays, stored.extra)
        else:
            self.arrays = self._initial_state()
        rounds = self.config.rounds
        if done["train"] == 0:
            for number in range(done["head"] + 1, rounds.head_rounds + 1):
                self._round("head", number, rounds.head_rounds)
        if self.config.method == "giva":
            self._prepare_bases()
            if done["train"] == 0:
                self.arrays = {**aggregate.initial_vectors(self.schema.layers, self.schema.ranks), **self.arrays}
        for number in range(done["train"] + 1, rounds.num_rounds + 1):
            self._round("train", number, rounds.num_rounds)
        self._finish()

    def _load(self, arrays: Arrays, extra: Arrays) -> None:
        self.arrays = arrays
        own = {name: array for name, array in extra.items() if name.startswith(_STRATEGY)}
        self.residual = {name: array for name, array in extra.items() if name not in own}
        self.aggregator.load_state({name.removeprefix(_STRATEGY): array for name, array in own.items()})

    # -- hello --------------------------------------------------------------------------------------------------------

    @property
    def reference(self) -> Hello:
        """What all sites agree on."""
        if self.members.reference is None:
            raise QuorumError("no site has introduced itself")
        return self.members.reference

    @property
    def schema(self) -> ModelSchema:
        """What the sites' models train and send."""
        return self.reference.schema

    @property
    def bases_digest(self) -> str:
        """Digest of the run's bases; empty before calibration."""
        return self.bases.digest if self.bases else ""

    def _hello(self) -> None:
        started = time.monotonic()
        self.members.wait()
        records = self.members.greet()
        number = 1 + len(self.store.rounds(self.run_id, "hello"))
        self._record("hello", number, records, started)
        self._need(self.config.rounds.min_sites, records, "were admitted")
        facts = self.store.run(self.run_id).facts
        for name in ("model_digest", "state_digest"):
            value = getattr(self.reference, name)
            if facts.get(name, value) != value:
                raise QuorumError(
                    f"the sites' {name.replace('_', ' ')} is not that of the run's start",
                    got=value[:12],
                    expected=str(facts[name])[:12],
                    remedy="start a new run",
                )
        self.store.set_facts(
            self.run_id, {"model_digest": self.reference.model_digest, "state_digest": self.reference.state_digest}
        )

    def _initial_state(self) -> Arrays:
        """The starting values of the head, from the first site by name; every site has proved that it has the same."""
        for site, node_id in self.members.nodes().items():
            [answer] = self._ask({site: node_id}, protocol.STATE, Payload(), "state")
            if answer.payload is None:
                continue
            arrays = protocol.unpack(answer.payload.array("state"), self.schema.state)
            if protocol.arrays_digest(arrays) == self.reference.state_digest:
                return arrays
        raise QuorumError("no site could send the starting values of the head")

    # -- calibration and bases ----------------------------------------------------------------------------------------

    def _prepare_bases(self) -> None:
        """Agree on the bases; a resumed run keeps those that it began with."""
        if "bases_digest" in self.store.run(self.run_id).facts:
            sketches, coordinates = sketches_from_arrays(self.store.load_blob(self.run_id, "sketches"))
        else:
            sketches, coordinates = self._calibrate()
            self.store.save_blob(self.run_id, "sketches", sketches_to_arrays(sketches, coordinates))
        started = time.monotonic()
        schema = self.schema
        self.bases = bases.build_bases(schema.layers, schema.ranks, sketches, self.config.giva, coordinates)
        self._bases_message = protocol.bases_to_payload(sketches, coordinates, schema)
        records = self._send_bases(self.members.nodes())
        self._record("bases", 1 + len(self.store.rounds(self.run_id, "bases")), records, started)
        self._need(self.config.rounds.quorum, records, "hold the run's bases")
        self.store.set_facts(self.run_id, {"bases_digest": self.bases.digest})

    def _calibrate(self) -> tuple[Sketches, Sketches | None]:
        """All passes of the plan; returns the aggregate Y, and Z where the init needs it."""
        giva = self.config.giva

        def one_pass(number: int, stage: Stage, previous: tuple[Stage, Sketches] | None) -> Sketches:
            started = time.monotonic()
            question = calibration_question(stage, previous, self.arrays, self.schema)
            answers = self._ask(self.members.nodes(), protocol.CALIBRATE, question, f"calibrate-{number}")
            hellos = {site: member.hello for site, member in self.members.admitted.items()}
            heard = read_sketches(stage, answers, hellos, self.schema, giva)
            self._need(self.config.rounds.quorum, heard.records, f"answered calibration pass {number}")
            mean = heard.mean(giva.sketch_bits)
            total, loss = sum(heard.weights), _mean(heard.losses, heard.weights)
            self._record("calibrate", number, heard.records, started, total_examples=total, train_loss=loss)
            return mean

        return calibration.run_passes(giva, one_pass)

    def _send_bases(self, nodes: dict[str, int]) -> list[SiteRecord]:
        """Broadcast the aggregate sketch; a site that builds other bases from it is taken out of the run."""
        records = []
        for answer in self._ask(nodes, protocol.BASES, self._bases_message or Payload(), "bases"):
            record = site_record(answer)
            if answer.payload is not None and (digest := str(answer.payload.values.get("bases"))) != self.bases_digest:
                reason = (
                    f"bases digest {digest[:12]}… but the run uses {self.bases_digest[:12]}…; its machine computes "
                    "differently: run `giva bases self-test` there"
                )
                record = replace(record, status="refused", reason=reason)
                self.members.drop(answer.site, reason)
            elif answer.payload is None:
                self.members.forget(answer.site)
            records.append(record)
        return records

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _round(self, phase: str, number: int, total: int) -> None:
        """One round: sample, train, check, aggregate, evaluate, store."""
        started = time.monotonic()
        rounds = self.config.rounds
        factor = "head" if phase == "head" else "both"
        if phase == "train" and rounds.mode == "alternate":
            factor = aggregate.alternate_factor(number)
        mu = self.aggregator.prepare(number, self.arrays)
        tried: list[SiteRecord] = []
        for attempt in range(rounds.retries + 1):
            accepted = self._train(phase, number, total, factor, mu, attempt)
            if len(accepted.updates) >= rounds.quorum:
                break
            tried = _merge_attempts(tried, accepted.records)
        else:
            raise QuorumError(
                f"round {number} did not reach its quorum in {rounds.retries + 1} attempts",
                got=_outcomes(tried),
                expected=f"{rounds.quorum} valid updates",
                remedy="see to the sites named, then resume the run",
            )
        error = self._aggregate(phase, number, accepted.updates)
        records = _merge_attempts(tried, accepted.records)
        evaluations: list[SiteEvaluation] = []
        if number % rounds.evaluate_every == 0 or number == total:
            records, evaluations = self._evaluate(number, records)
        weights = [update.num_examples for update in accepted.updates]
        eval_weights = [evaluation.num_examples for evaluation in evaluations]
        self._record(
            phase,
            number,
            records,
            started,
            total_examples=sum(weights),
            train_loss=_mean([update.train_loss for update in accepted.updates], weights),
            eval_loss=_mean([evaluation.loss for evaluation in evaluations], eval_weights),
            metrics=metrics.total_metrics(self.config.task.kind, evaluations),
            aggregation_error=error,
            keep_state=True,
        )

    def _train(self, phase: str, number: int, total: int, factor: str, mu: float, attempt: int) -> Accepted:
        self._welcome_back()
        nodes = self._sample(
            self.config.rounds.fraction_train, self.config.rounds.min_sites, f"{phase}-{number}-{attempt}"
        )
        digest = self.bases_digest
        start = {**self.arrays, **self.residual}
        names = protocol.trained_names(self.schema, factor, digest)
        request = TrainRequest(start, number, total, digest, names, mu, factor == "head")
        payload = protocol.train_to_payload(request, self.schema, factor)
        shapes = {name: start[name].shape for name in names}
        updates: list[ClientUpdate] = []
        records: list[SiteRecord] = []
        kind = protocol.HEAD if phase == "head" else protocol.ROUND
        for answer in self._ask(nodes, kind, payload, f"{phase}-{number}"):
            record = site_record(answer)
            if answer.payload is not None:
                try:
                    update = protocol.update_from_payload(answer.payload, shapes)
                    hello = self.members.admitted[answer.site].hello
                    guard.check_update(update, hello, start, digest, self.config.rounds.max_update_norm)
                    # what was not trained counts as unchanged, so that every strategy sees all arrays
                    updates.append(replace(update, arrays={**self.arrays, **update.arrays}))
                    record = replace(
                        record,
                        num_examples=update.num_examples,
                        num_steps=update.num_steps,
                        train_loss=update.train_loss,
                        train_seconds=update.seconds,
                    )
                except GivaError as error:
                    record = replace(record, status="refused", reason=str(error))
            elif answer.reason.startswith("bases"):
                self.members.forget(answer.site)
            records.append(record)
        return Accepted(updates, records)

    def _aggregate(self, phase: str, number: int, updates: Sequence[ClientUpdate]) -> float | None:
        """Make the next global arrays; returns the aggregation error where there are vectors."""
        made = self.aggregator.aggregate(number, updates)
        check_finite(made)
        error = None
        if phase == "train" and self.bases is not None:
            sites = [update.arrays for update in updates]
            weights = [update.num_examples for update in updates]
            lost = None
            if self.config.rounds.mode == "exact":
                lost = aggregate.exact_residual(sites, weights, made, self.schema.layers)
                self.residual = aggregate.add_arrays(self.residual, lost)
            error = aggregate.aggregation_error(sites, weights, made, self.bases, lost)
        self.arrays = made
        return error

    def _evaluate(self, number: int, records: list[SiteRecord]) -> tuple[list[SiteRecord], list[SiteEvaluation]]:
        """Let sampled sites evaluate the new global arrays; their results join the round's records."""
        nodes = self._sample(self.config.rounds.fraction_evaluate, 0, f"evaluate-{number}", with_eval=True)
        if not nodes:
            return records, []
        payload = protocol.global_to_payload({**self.arrays, **self.residual}, self.schema, self.bases_digest)
        by_site = {record.site: record for record in records}
        evaluations = []
        for answer in self._ask(nodes, protocol.EVALUATE, payload, f"evaluate-{number}"):
            record = by_site.get(answer.site) or SiteRecord(answer.site, "ok")
            record = replace(
                record, bytes_up=record.bytes_up + answer.bytes_up, bytes_down=record.bytes_down + answer.bytes_down
            )
            try:
                if answer.payload is None:
                    record = replace(record, reason=record.reason or f"evaluation: {answer.reason}")
                else:
                    evaluation = protocol.evaluation_from_payload(answer.payload)
                    hello = self.members.admitted[answer.site].hello
                    guard.check_evaluation(evaluation, hello, self.config.task.kind)
                    evaluations.append(evaluation)
                    record = replace(
                        record,
                        eval_examples=evaluation.num_examples,
                        eval_loss=evaluation.loss,
                        metrics=evaluation.metrics,
                    )
            except GivaError as error:
                record = replace(record, reason=record.reason or f"evaluation refused: {error}")
            by_site[answer.site] = record
        return sorted(by_site.values(), key=lambda record: record.site), evaluations

    def _welcome_back(self) -> None:
        """Admit nodes that connected since the last round, and give them the bases; wait where too few are left."""
        self.members.wait()
        before = set(self.members.admitted)
        self.members.greet()
        new = {site: node_id for site, node_id in self.members.nodes().items() if site not in before}
        if new and self.bases is not None:
            self._send_bases(new)

    def _sample(self, fraction: float, minimum: int, key: str, with_eval: bool = False) -> dict[str, int]:
        """A sample of the members that depends on the run's seed, the round and the members' names alone."""
        nodes = self.members.nodes(lambda member: not with_eval or member.hello.num_eval > 0)
        count = min(len(nodes), max(minimum, math.ceil(fraction * len(nodes))))
        chosen = random.Random(f"{self.config.giva.seed}-{key}").sample(sorted(nodes), count)
        return {site: nodes[site] for site in sorted(chosen)}

    # -- finish -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        checkpoint.save_adapter(
            self.store.adapter_folder(self.run_id),
            self.bases,
            self.arrays,
            self.config,
            residual=self.residual or None,
            model_digest=self.reference.model_digest,
        )
        self.store.set_facts(self.run_id, {"arrays_digest": protocol.arrays_digest({**self.arrays, **self.residual})})
        ask(self.grid, self.members.nodes(), protocol.FINISH, Payload(), deadline_seconds=_FINISH_SECONDS)

    # -- shared -------------------------------------------------------------------------------------------------------

    def _ask(self, nodes: dict[str, int], kind: str, payload: Payload, group: str) -> list[Answer]:
        return ask(self.grid, nodes, kind, payload, deadline_seconds=self.config.rounds.deadline_seconds, group=group)

    def _need(self, count: int, records: Sequence[SiteRecord], what: str) -> None:
        if sum(record.status == "ok" for record in records) < count:
            raise QuorumError(
                f"too few sites {what}",
                got=_outcomes(records),
                expected=f"at least {count} sites",
                remedy="see to the sites named, then resume the run",
            )

    def _record(
        self,
        phase: str,
        number: int,
        sites: Sequence[SiteRecord],
        started: float,
        *,
        keep_state: bool = False,
        **totals: object,
    ) -> None:
        record = RoundRecord(
            phase=phase,
            round=number,
            sites=tuple(sites),
            seconds=time.monotonic() - started,
            bytes_up=sum(site.bytes_up for site in sites),
            bytes_down=sum(site.bytes_down for site in sites),
            **totals,  # type: ignore[arg-type]
        )
        state = {_STRATEGY + name: array for name, array in self.aggregator.state().items()}
        extra = {**self.residual, **state} if keep_state else None
        self.store.record(self.run_id, record, self.arrays if keep_state else None, extra or None)
        self.on_record(record)


def _merge_attempts(earlier: Sequence[SiteRecord], later: Sequence[SiteRecord]) -> list[SiteRecord]:
    """One record for each site: the later attempt's outcome with the bytes of both."""
    merged = {record.site: record for record in earlier}
    for record in later:
        if (before := merged.get(record.site)) is not None:
            record = replace(
                record, bytes_up=record.bytes_up + before.bytes_up, bytes_down=record.bytes_down + before.bytes_down
            )
        merged[record.site] = record
    return sorted(merged.values(), key=lambda record: record.site)


def _outcomes(records: Sequence[SiteRecord]) -> str:
    return "; ".join(f"{r.site}: {r.status}{f' ({r.reason})' if r.reason else ''}" for r in records) or "no site"


def _mean(values: Sequence[float], weights: Sequence[int]) -> float | None:
    total = sum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else None
