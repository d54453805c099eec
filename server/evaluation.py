"""The server's side of an evaluation: what is let in, and the totals over all sites."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from giva_core import metrics, protocol
from giva_core.config import TaskConfig
from giva_core.errors import GivaError
from giva_core.protocol import Hello, Payload
from giva_core.types import RoundRecord, SiteEvaluation, SiteRecord

from .exchange import Answer
from .guard import check_evaluation
from .session import mean, one_line

log = logging.getLogger("giva.server")


@dataclass
class Due:
    """The evaluation of a recorded round's state, as its answers come in.

    Attributes:
        record: The round.
        nodes: The sites sampled for it.
        answers: What they answered so far, by site; every one's answer counts once.
        hellos: What those said of themselves; a site may have left by the time its answer is read.
    """

    record: RoundRecord
    nodes: dict[str, int]
    answers: dict[str, Answer] = field(default_factory=dict)
    hellos: dict[str, Hello] = field(default_factory=dict)

    @property
    def waiting(self) -> set[str]:
        """The sites that have not answered."""
        return self.nodes.keys() - self.answers.keys()

    def note(self, answers: Iterable[Answer], hellos: Mapping[str, Hello]) -> None:
        """Take answers to `evaluate.round`."""
        for answer in answers:
            self.answers[answer.site], self.hellos[answer.site] = answer, hellos[answer.site]

    def note_updates(self, answers: Iterable[Answer], hellos: Mapping[str, Hello]) -> None:
        """Take what came beside the updates of the next round, which counts their bytes.

        A site whose update failed has not evaluated, or its evaluation was lost with it: it is asked again.
        """
        for answer in answers:
            beside = None if answer.payload is None else protocol.evaluation_beside(answer.payload)
            if isinstance(beside, Payload):
                self.note([Answer(answer.site, answer.node_id, beside, "ok")], hellos)
            elif beside is not None:
                reason = one_line(beside)
                self.note([Answer(answer.site, answer.node_id, None, "failed", reason)], hellos)

    def evaluated(self, task: TaskConfig) -> RoundRecord:
        """The record with what the sites found, and the totals over them."""
        answers = [self.answers[site] for site in sorted(self.answers)]
        records, evaluations = read_evaluations(answers, self.hellos, task, self.record.sites)
        weights = [evaluation.num_examples for evaluation in evaluations]
        return replace(
            self.record,
            sites=tuple(records),
            eval_loss=mean([evaluation.loss for evaluation in evaluations], weights),
            metrics=total_metrics(task.kind, evaluations),
            bytes_up=sum(record.bytes_up for record in records),
            bytes_down=sum(record.bytes_down for record in records),
        )


def read_evaluations(
    answers: Sequence[Answer], hellos: Mapping[str, Hello], task: TaskConfig, records: Sequence[SiteRecord]
) -> tuple[list[SiteRecord], list[SiteEvaluation]]:
    """Check every answer and join it to the round's records; one that does not qualify leaves its reason there.

    Args:
        answers: What the sites answered.
        hellos: What they said of themselves.
        task: The run's task.
        records: The round's records so far.

    Returns:
        The records, sorted by site, and the evaluations that count, in the order of the sites' names.
    """
    by_site = {record.site: record for record in records}
    evaluations: list[SiteEvaluation] = []
    for answer in answers:
        record = by_site.get(answer.site) or SiteRecord(answer.site, answer.status)
        record = replace(
            record, bytes_up=record.bytes_up + answer.bytes_up, bytes_down=record.bytes_down + answer.bytes_down
        )
        if answer.payload is None:
            record = replace(record, reason=record.reason or f"evaluation: {answer.reason}")
        else:
            try:
                found = protocol.evaluation_from_payload(answer.payload)
                check_evaluation(found, hellos[answer.site], task)
                evaluations.append(found)
                record = replace(record, eval_examples=found.num_examples, eval_loss=found.loss, metrics=found.metrics)
            except GivaError as error:
                record = replace(record, reason=record.reason or f"evaluation refused: {error}")
        by_site[answer.site] = record
    return sorted(by_site.values(), key=lambda record: record.site), evaluations


def total_metrics(kind: str, evaluations: Sequence[SiteEvaluation]) -> dict[str, float]:
    """Metrics over all sites; where they cannot be made the round goes on without, for its training is done."""
    try:
        return metrics.total_metrics(kind, evaluations)
    except (GivaError, ArithmeticError, ValueError) as error:
        log.warning("the round has no metrics over all sites: %s", error)
        return {}
