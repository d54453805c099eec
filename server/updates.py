"""The server's side of a training answer: what is let in, and what becomes of a round that took several attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from giva_core import protocol
from giva_core.errors import GivaError
from giva_core.protocol import Hello
from giva_core.types import Arrays, ClientUpdate, SiteRecord
from giva_core.wire import PLAIN, Coding

from .exchange import Answer, site_record
from .guard import check_update


@dataclass(frozen=True)
class Accepted:
    """Updates that passed the guard, in the order of the sites' names, and every sampled site's record."""

    updates: list[ClientUpdate]
    records: list[SiteRecord]


def read_updates(
    answers: Sequence[Answer],
    hellos: Mapping[str, Hello],
    start: Arrays,
    names: Sequence[str],
    bases_digest: str,
    max_norm: float,
    coding: Coding = PLAIN,
    sent_digest: str = "",
) -> Accepted:
    """Check every answer; one that does not qualify is refused with its reason.

    Args:
        answers: What the sites answered.
        hellos: What they said of themselves.
        start: The global arrays they started from.
        names: Which of these they trained, in wire order.
        bases_digest: The run's bases; empty where there are none.
        max_norm: Largest change of all arrays; 0 for no limit.
        coding: How numbers travel; differences are added to `start`, whatever the sites got of it.
        sent_digest: Digest of what the sites got, where that was rounded.
    """
    shapes = {name: start[name].shape for name in names}
    accepted = Accepted([], [])
    for answer in answers:
        record = site_record(answer)
        if answer.payload is not None:
            try:
                update = protocol.update_from_payload(answer.payload, shapes, coding, start, sent_digest)
                check_update(update, hellos[answer.site], start, bases_digest, max_norm)
                accepted.updates.append(update)
                record = replace(
                    record,
                    num_examples=update.num_examples,
                    num_steps=update.num_steps,
                    train_loss=update.train_loss,
                    train_seconds=update.seconds,
                )
            except GivaError as error:
                record = replace(record, status="refused", reason=str(error))
        accepted.records.append(record)
    return accepted


def merge_attempts(earlier: Sequence[SiteRecord], later: Sequence[SiteRecord]) -> list[SiteRecord]:
    """One record for each site: the later attempt's outcome, with the bytes of both.

    An update of an earlier attempt was thrown away with it, so its site counts only where it came again.
    """
    merged = {record.site: _uncounted(record) for record in earlier}
    for record in later:
        if (before := merged.get(record.site)) is not None:
            record = replace(
                record, bytes_up=record.bytes_up + before.bytes_up, bytes_down=record.bytes_down + before.bytes_down
            )
        merged[record.site] = record
    return sorted(merged.values(), key=lambda record: record.site)


def _uncounted(record: SiteRecord) -> SiteRecord:
    if record.status != "ok":
        return record
    return SiteRecord(
        record.site, "failed", "attempt without quorum", bytes_up=record.bytes_up, bytes_down=record.bytes_down
    )
