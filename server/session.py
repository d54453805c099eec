"""What every phase of a run needs: who is in it, a question to them, a quorum, a sample, a record of what happened."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from giva_core import protocol
from giva_core.config import RunConfig
from giva_core.errors import QuorumError
from giva_core.protocol import Hello, Payload
from giva_core.types import Arrays, ModelSchema, RoundRecord, SiteRecord

from .exchange import Answer, ask
from .members import Members
from .run_store import RunStore


@dataclass
class Session:
    """One process's hold on a run.

    Attributes:
        grid: Flower's grid, in whatever engine.
        config: The run's configuration.
        store: Where rounds, metrics and states are kept.
        run_id: The run.
        on_record: Told each finished phase and round.
        members: The sites.
    """

    grid: Grid
    config: RunConfig
    store: RunStore
    run_id: str
    on_record: Callable[[RoundRecord], None]
    members: Members = field(init=False)

    def __post_init__(self) -> None:
        self.members = Members(self.grid, self.config)

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

    def greet(self) -> list[SiteRecord]:
        """Let new nodes introduce themselves; whom this admits or turns away is recorded as one more `hello`."""
        started = time.monotonic()
        records = self.members.greet()
        if not records:
            return []
        self.record("hello", self.next_number("hello"), records, started)
        facts: dict[str, str] = {}
        for site in (record.site for record in records if record.status == "ok"):
            hello = self.members.admitted[site].hello
            facts.update({f"site.{site}.versions": hello.versions, f"site.{site}.device": hello.device})
        self.store.set_facts(self.run_id, {name: one_line(text) for name, text in facts.items()})
        return records

    def ask(
        self,
        nodes: dict[str, int],
        kind: str,
        payload: Payload,
        group: str,
        instead: Mapping[str, Payload] | None = None,
        take: Callable[[Answer], Answer] = lambda answer: answer,
        answer_bytes: int = 0,
    ) -> list[Answer]:
        """Ask sites, and note who did not answer and who lost its bases; the rest is as for `exchange.ask`."""
        answers = ask(
            self.grid,
            nodes,
            kind,
            payload,
            deadline_seconds=self.config.rounds.deadline_seconds,
            group=group,
            instead=instead or {},
            take=take,
            answer_bytes=answer_bytes,
        )
        self.members.bench.note(answers)
        for answer in answers:
            if kind in (protocol.ROUND, protocol.EVALUATE) and answer.reason.startswith("bases"):
                self.members.forget(answer.site)  # it introduces itself anew in the next round, and gets them again
        return answers

    def sample(self, fraction: float, minimum: int, key: str, with_eval: bool = False) -> dict[str, int]:
        """A sample of the members that depends on the run's seed, the round and the members' names alone."""
        nodes = self.members.active(minimum, lambda member: not with_eval or member.hello.num_eval > 0)
        count = min(len(nodes), max(minimum, math.ceil(fraction * len(nodes))))
        chosen = random.Random(f"{self.config.giva.seed}-{key}").sample(sorted(nodes), count)
        return {site: nodes[site] for site in sorted(chosen)}

    def need(self, count: int, records: Sequence[SiteRecord], what: str) -> None:
        """Raise QuorumError where fewer than `count` sites did what was asked."""
        if sum(record.status == "ok" for record in records) < count:
            raise QuorumError(
                f"too few sites {what}",
                got=outcomes(records),
                expected=f"at least {count} sites",
                remedy=f"see to the sites named, then continue with `giva run resume {self.run_id}`; "
                f'a run of `flwr run` with the line resume = "{self.run_id}" on top of its file',
            )

    def next_number(self, phase: str) -> int:
        """The number of the next record of a phase that may come several times in a run."""
        return 1 + len(self.store.rounds(self.run_id, phase))

    def record(
        self,
        phase: str,
        number: int,
        sites: Sequence[SiteRecord],
        started: float,
        *,
        arrays: Arrays | None = None,
        extra: Arrays | None = None,
        **totals: object,
    ) -> None:
        """Store a finished phase or round, with the state after it where there is one, and tell who watches."""
        record = RoundRecord(
            phase=phase,
            round=number,
            sites=tuple(sites),
            seconds=time.monotonic() - started,
            bytes_up=sum(site.bytes_up for site in sites),
            bytes_down=sum(site.bytes_down for site in sites),
            **totals,  # type: ignore[arg-type]
        )
        self.store.record(self.run_id, record, arrays, extra or None)
        self.on_record(record)

    def amend(self, record: RoundRecord) -> None:
        """Store what became known of a recorded round later on, and tell who watches."""
        self.store.amend(self.run_id, record)
        self.on_record(record)


def outcomes(records: Sequence[SiteRecord]) -> str:
    """What came of asking each site, in one line."""
    return "; ".join(f"{r.site}: {r.status}{f' ({r.reason})' if r.reason else ''}" for r in records) or "no site"


def mean(values: Sequence[float], weights: Sequence[int]) -> float | None:
    """`Σ w x / Σ w`; None where there is nothing."""
    total = sum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else None


def one_line(text: str) -> str:
    """What a site says of itself, fit for tables."""
    return "".join(character for character in text if character.isprintable())[:200]
