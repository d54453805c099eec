"""The server's side of an evaluation: what is let in, and the totals over all sites."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from giva_core import metrics, protocol
from giva_core.config import TaskConfig
from giva_core.errors import GivaError
from giva_core.protocol import Hello
from giva_core.types import SiteEvaluation, SiteRecord

from .exchange import Answer
from .guard import check_evaluation

log = logging.getLogger("giva.server")


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
