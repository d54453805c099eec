"""The run: hello → head rounds → calibration → bases → training rounds → finish, each step checked, stored, resumable.

Flower's own loop waits without limit for lost nodes, averages NaN, and cannot resume. Here every phase has a deadline
and a quorum, every answer passes the guard before it counts, sums run in the order of the sites' names, and nothing of
a round depends on anything but the run's seed and the stored state: a resumed run ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flwr.serverapp import Grid

from giva_core import aggregate, checkpoint, protocol
from giva_core.config import RunConfig
from giva_core.errors import GivaError, QuorumError
from giva_core.protocol import Payload, TrainRequest
from giva_core.types import Arrays, BasesSet, ModelSchema, RoundRecord, SiteRecord
from giva_core.wire import PLAIN

from .agreement import agree_on_bases, send_bases
from .evaluation import Due
from .exactness import aggregated, tells_error
from .exchange import ask, site_record
from .run_store import RunStore
from .session import Session, mean, outcomes
from .strategy import Aggregator, check_finite, make_aggregator
from .updates import Accepted, Intake, merge_attempts

#: Sites of a round up to which their updates are kept for the aggregation error; of more only the sum is kept.
KEPT_UPDATES = 64
_FINISH_SECONDS = 10.0
_START = "start"  # the blob with the starting head, which rounded numbers count from
_STRATEGY = "strategy:"  # prefix of the strategy's own arrays in a stored state


@dataclass(frozen=True)
class Plan:
    """One round to come.

    Attributes:
        phase: `head` or `train`.
        number: From 1 within the phase.
        total: Rounds of the phase.
        factor: Which vectors are trained: `both`, `lambda_o`, `lambda_s`; `head` for none.
        names: The arrays that are trained, in wire order.
    """

    phase: str
    number: int
    total: int
    factor: str
    names: tuple[str, ...]


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
        self.config, self.store, self.run_id = config, store, run_id
        self.session = Session(grid, config, store, run_id, on_record)
        self.members = self.session.members
        self.aggregator: Aggregator = make_aggregator(config)
        self.arrays: Arrays = {}
        self.residual: Arrays = {}
        self.bases: BasesSet | None = None
        self._bases_message = Payload()
        self._coding = PLAIN

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
            if self.config.wire.precision != "float32":
                self.store.save_blob(self.run_id, _START, self.arrays)
        if (precision := self.config.wire.precision) != "float32":
            start = self.store.load_blob(self.run_id, _START)
            self._coding = protocol.coding_of(precision, self.session.schema, start)
        rounds = self.config.rounds
        if done["train"] == 0:
            for number in range(done["head"] + 1, rounds.head_rounds + 1):
                self._round("head", number, rounds.head_rounds)
            self._evaluate_last("head", rounds.head_rounds)
        if self.config.has_bases:
            self.bases, self._bases_message = agree_on_bases(self.session, self.arrays)
            if done["train"] == 0:
                self.arrays = {**aggregate.initial_vectors(self.session.schema), **self.arrays}
        for number in range(done["train"] + 1, rounds.num_rounds + 1):
            self._round("train", number, rounds.num_rounds)
        self._evaluate_last("train", rounds.num_rounds)
        self._finish()

    def _extra(self) -> Arrays:
        """What is stored beside the global arrays: residuals, and what the strategy keeps."""
        return {**self.residual, **{_STRATEGY + name: array for name, array in self.aggregator.state().items()}}

    def _load(self, arrays: Arrays, extra: Arrays) -> None:
        self.arrays = arrays
        own = {name: array for name, array in extra.items() if name.startswith(_STRATEGY)}
        self.residual = {name: array for name, array in extra.items() if name not in own}
        self.aggregator.load_state({name.removeprefix(_STRATEGY): array for name, array in own.items()})

    @property
    def bases_digest(self) -> str:
        """Digest of the run's bases; empty before calibration."""
        return self.bases.digest if self.bases else ""

    # -- hello --------------------------------------------------------------------------------------------------------

    def _hello(self) -> None:
        self.members.wait()
        self.session.need(self.config.rounds.min_sites, self.session.greet(), "were admitted")
        known, reference = self.store.run(self.run_id).facts, self.session.reference
        found = {name: getattr(reference, name) for name in ("model_digest", "state_digest", "frozen_digest")}
        for name, value in found.items():
            if known.get(name, value) != value:
                raise QuorumError(
                    f"the sites' {name.replace('_', ' ')} is not that of the run's start",
                    got=value[:12],
                    expected=str(known[name])[:12],
                    remedy="start a new run",
                )
        self.store.set_facts(self.run_id, found)

    def _initial_state(self) -> Arrays:
        """The starting values of the head, from the first site by name; every site has said that it has the same."""
        started = time.monotonic()
        refused: list[SiteRecord] = []
        found: Arrays | None = None
        for site, node_id in self.members.nodes().items():
            [answer] = self.session.ask({site: node_id}, protocol.STATE, Payload(), "state")
            if answer.payload is None:
                continue
            try:
                arrays = protocol.unpack(answer.payload.array("state"), self.session.schema.state)
                if protocol.arrays_digest(arrays) == self.session.reference.state_digest:
                    found = arrays
                    break
                reason = "its starting head is not what it said when it joined"
            except GivaError as error:
                reason = f"its starting head cannot be read: {error}"
            self.members.drop(site, reason)
            refused.append(replace(site_record(answer), status="refused", reason=reason))
        if refused:
            self.session.record("hello", self.session.next_number("hello"), refused, started)
        if found is None:
            raise QuorumError("no site could send the starting values of the head", got=outcomes(refused))
        return found

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _round(self, phase: str, number: int, total: int) -> None:
        """One round: sample, train, check, aggregate, evaluate, store."""
        started = time.monotonic()
        rounds = self.config.rounds
        self.members.bench.next_round()
        plan = self._plan(phase, number, total)
        self._admit_newcomers()
        due = self._due(phase, number - 1)
        mu = self.aggregator.prepare(number, self.arrays)
        tried: list[SiteRecord] = []
        for attempt in range(rounds.retries + 1):
            accepted = self._train(plan, mu, attempt, due)
            if len(accepted.updates) >= rounds.quorum:
                break
            tried = merge_attempts(tried, accepted.records)
            self._admit_newcomers()
        else:
            raise QuorumError(
                f"round {number} did not reach its quorum in {rounds.retries + 1} attempts",
                got=outcomes(tried),
                expected=f"{rounds.quorum} valid updates",
                remedy="see to the sites named, then resume the run",
            )
        if due is not None:
            self._complete(due)
        error = self._aggregate(plan, accepted)
        weights = [update.num_examples for update in accepted.updates]
        self.session.record(
            phase,
            number,
            merge_attempts(tried, accepted.records),
            started,
            total_examples=sum(weights),
            train_loss=mean([update.train_loss for update in accepted.updates], weights),
            aggregation_error=error,
            arrays=self.arrays,
            extra=self._extra(),
        )

    def _plan(self, phase: str, number: int, total: int) -> Plan:
        factor = "head" if phase == "head" else aggregate.round_factor(self.config, number)
        names = protocol.trained_names(self.session.schema, factor, self.bases_digest)
        return Plan(phase, number, total, factor, names)

    def _train(self, plan: Plan, mu: float, attempt: int, due: Due | None) -> Accepted:
        """Let sampled sites train, and evaluate where that is due; who sits out is recorded as well."""
        rounds = self.config.rounds
        nodes = self.session.sample(rounds.fraction_train, rounds.min_sites, f"{plan.phase}-{plan.number}-{attempt}")
        start = {**self.arrays, **self.residual}
        is_head = plan.phase == "head"
        run = self.run_id if self._coding.precision == "int8" else ""
        request = TrainRequest(start, plan.number, plan.total, self.bases_digest, plan.names, mu, is_head, run=run)
        payload = protocol.train_to_payload(request, self.session.schema, plan.factor, self._coding)
        with_evaluation = Payload(payload.arrays, {**payload.values, "evaluate": True})
        evaluating = dict.fromkeys(nodes.keys() & due.waiting, with_evaluation) if due else {}
        resting, hellos = self.members.bench.records(nodes), self.members.hellos()
        kind = protocol.HEAD if is_head else protocol.ROUND
        intake = Intake(
            hellos,
            start,
            plan.names,
            self.bases_digest,
            rounds.max_update_norm,
            keeps=self._keeps_updates(plan, len(nodes)),
            coding=self._coding,
            sent_digest=str(payload.values.get("digest", "")),
        )
        size = sum(start[name].nbytes for name in plan.names)
        group = f"{plan.phase}-{plan.number}"
        answers = self.session.ask(nodes, kind, payload, group, evaluating, intake.take, size)
        if due:
            due.note_updates((answer for answer in answers if answer.site in evaluating), hellos)
        accepted = intake.accepted(answers)
        return replace(accepted, records=[*accepted.records, *resting])

    def _keeps_updates(self, plan: Plan, sites: int) -> bool:
        """Whether a round takes more of the updates than their mean: for the strategy, a residual, or the error."""
        if not self.aggregator.is_mean or self.config.rounds.mode == "exact" or self.config.method == "fedex-lora":
            return True
        return plan.phase == "train" and tells_error(self.config.method) and sites <= KEPT_UPDATES

    def _aggregate(self, plan: Plan, accepted: Accepted) -> float | None:
        """Make the next global arrays; returns the aggregation error where there are vectors and the updates."""
        if accepted.mean is not None:
            self.arrays = {**self.arrays, **accepted.mean}
            check_finite(self.arrays)
            return None
        # what was not trained counts as unchanged, so that every strategy sees all arrays
        updates = [replace(update, arrays={**self.arrays, **update.arrays}) for update in accepted.updates]
        made = self.aggregator.aggregate(plan.number, updates)
        check_finite(made)
        # momentum moves even what no site trained in this round; `alternate` is exact only where that stays
        made = {name: array if name in plan.names else self.arrays[name] for name, array in made.items()}
        error = None
        if plan.phase == "train":
            error, self.residual = aggregated(
                self.config,
                self.session.schema,
                self.bases,
                [update.arrays for update in updates],
                [update.num_examples for update in updates],
                made,
                self.residual,
            )
        self.arrays = made
        return error

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def _due(self, phase: str, number: int) -> Due | None:
        """The evaluation of this round's state, where it should have one and has none yet.

        The sites get that state anyway to train from in the next round, and evaluate it along with that: an exchange
        with sites on real machines costs seconds, and the arrays would travel twice.
        """
        rounds = self.config.rounds
        total = rounds.head_rounds if phase == "head" else rounds.num_rounds
        records = [record for record in self.store.rounds(self.run_id, phase) if record.round == number]
        if not records or (number % rounds.evaluate_every != 0 and number != total):
            return None
        if records[0].eval_loss is not None:
            return None
        nodes = self.session.sample(rounds.fraction_evaluate, 0, f"evaluate-{number}", with_eval=True)
        return Due(records[0], nodes) if nodes else None

    def _evaluate_last(self, phase: str, total: int) -> None:
        """Evaluate the state after a phase's last round, which no later round brings along."""
        if (due := self._due(phase, total)) is not None:
            self._complete(due)

    def _complete(self, due: Due) -> None:
        """Ask the sites that have not evaluated yet, and add the evaluation to its round's record."""
        left = {site: node_id for site, node_id in self.members.nodes().items() if site in due.waiting}
        if left:
            arrays = {**self.arrays, **self.residual}
            is_head = due.record.phase == "head"
            payload = protocol.global_to_payload(arrays, self.session.schema, self.bases_digest, self._coding, is_head)
            hellos = self.members.hellos()
            answers = self.session.ask(left, protocol.EVALUATE, payload, f"evaluate-{due.record.round}")
            due.note(answers, hellos)
        self.session.amend(due.evaluated(self.config.task))

    def _admit_newcomers(self) -> None:
        """Admit nodes that connected since the last round, and give them the bases; wait where too few are left."""
        self.members.wait()
        before = set(self.members.nodes().values())
        self.session.greet()
        new = {site: node_id for site, node_id in self.members.nodes().items() if node_id not in before}
        if new and self.bases is not None:
            started = time.monotonic()
            records = send_bases(self.session, new, self._bases_message, self.bases.digest)
            self.session.record("bases", self.session.next_number("bases"), records, started)

    # -- finish -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        checkpoint.save_adapter(
            self.store.adapter_folder(self.run_id),
            self.bases,
            self.arrays,
            self.config,
            residual=self.residual or None,
            model_digest=self.session.reference.model_digest,
            head_modules=_head_modules(self.session.schema),
        )
        self.store.set_facts(self.run_id, {"arrays_digest": protocol.arrays_digest({**self.arrays, **self.residual})})
        ask(self.session.grid, self.members.nodes(), protocol.FINISH, Payload(), deadline_seconds=_FINISH_SECONDS)


def _head_modules(schema: ModelSchema) -> tuple[str, ...]:
    """The modules that are trained whole, in model order: what holds the schema's arrays besides the adapter's."""
    names = (name.rpartition(".")[0] for name in schema.state if name not in schema.adapter)
    return tuple(dict.fromkeys(name for name in names if name))
