"""Questions to sites and their answers: one message to each, replies until all are in or the deadline has passed.

Flower's `send_and_receive` waits for the slowest node without saying who failed and how. Here every site asked has an
outcome: a payload, or a reason. Bytes are counted as serialised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from types import MappingProxyType

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.serverapp import Grid

from giva_core.protocol import Payload
from giva_core.types import SiteRecord

POLL_SECONDS = 0.5  # a look costs SuperLink and server some hundredths of a second of processor time each
LOOK_SECONDS = 1.0  # from one look at who is connected to the next
LEFT_SECONDS = 5.0  # a node may drop out of sight for a moment
PULLED_AT_ONCE = 64  # Flower gives all answers that are there at once; a thousand updates would be held in memory,
PULLED_BYTES = 2**28  # and so would 64 sites' sketches of a large model
_MESSAGE_SLACK_SECONDS = 60.0  # a reply on its way at the deadline still finds its message alive


@dataclass(frozen=True)
class Answer:
    """What came of asking one site.

    Attributes:
        site: Its name, or the node id before it has said its name.
        node_id: Its Flower node.
        payload: What it answered; None where it did not.
        status: `ok`, `failed` (an error reply, or none that can be read) or `missing` (no reply before the deadline, or
            before its node left).
        reason: Why there is no payload.
        bytes_down: Bytes of the question.
        bytes_up: Bytes of the answer.
    """

    site: str
    node_id: int
    payload: Payload | None
    status: str
    reason: str = ""
    bytes_down: int = 0
    bytes_up: int = 0


def to_content(payload: Payload) -> RecordDict:
    """A payload as Flower records."""
    arrays = ArrayRecord({name: Array(array) for name, array in payload.arrays.items()})
    return RecordDict({"arrays": arrays, "values": ConfigRecord(dict(payload.values))})


def from_content(content: RecordDict) -> Payload:
    """The inverse of `to_content`."""
    arrays = {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}
    values = {name: value for record in content.config_records.values() for name, value in record.items()}
    return Payload(arrays, values)  # type: ignore[arg-type]


def message_bytes(message: Message) -> int:
    """Bytes of a message as it is serialised for the wire."""
    return message_to_proto(message).ByteSize()


def ask(
    grid: Grid,
    nodes: Mapping[str, int],
    kind: str,
    payload: Payload,
    *,
    deadline_seconds: float,
    group: str = "",
    instead: Mapping[str, Payload] = MappingProxyType({}),
    take: Callable[[Answer], Answer] = lambda answer: answer,
    answer_bytes: int = 0,
) -> list[Answer]:
    """Send `payload` to every node and collect the answers.

    Args:
        grid: Flower's grid.
        nodes: Node id by site name.
        kind: The message type.
        payload: The question.
        deadline_seconds: Seconds to wait for the last answer; less where all who have not answered have left.
        group: The round, for Flower's records.
        instead: By site name, for those that are asked something else than the others.
        take: Given every answer as it comes; what it returns is kept in its place, so that large answers need not be.
        answer_bytes: About how large an answer is, where it may be large.

    Returns:
        One answer for every site, sorted by site name, whatever order they came in.
    """
    names = {node_id: site for site, node_id in nodes.items()}
    ttl = deadline_seconds + _MESSAGE_SLACK_SECONDS
    common, own = to_content(payload), {site: to_content(question) for site, question in instead.items()}
    messages = [
        Message(own.get(site, common), node_id, kind, ttl=ttl, group_id=group)
        for node_id, site in sorted(names.items())
    ]
    sizes: dict[int, int] = {}  # sites asked the same share one content; serialised, each would have its own
    for message in messages:
        if id(message.content) not in sizes:
            sizes[id(message.content)] = message_bytes(message)
    down = {message.metadata.dst_node_id: sizes[id(message.content)] for message in messages}
    pending: dict[str, int] = {}
    answers: dict[int, Answer] = {}
    # Flower gives no id for a message it could not push, and no ids at all where the messages are too large
    for node_id, message_id in zip_longest(sorted(names), grid.push_messages(messages)):
        if message_id:
            pending[message_id] = node_id
        else:
            answers[node_id] = Answer(
                names[node_id], node_id, None, "failed", "the message could not be sent", down[node_id]
            )
    ends = time.monotonic() + deadline_seconds
    reason = f"no answer within {deadline_seconds:g} s"
    departure = _Departure(grid)
    at_once = min(PULLED_AT_ONCE, max(1, PULLED_BYTES // max(1, answer_bytes)))
    while pending:
        waited_for, in_vain = list(pending), 0.0
        for start in range(0, len(waited_for), at_once):
            began, before = time.monotonic(), len(pending)
            for reply in grid.pull_messages(waited_for[start : start + at_once]):
                # an error reply may come from the server's own id, so the question it answers tells the site
                node_id = pending.pop(reply.metadata.reply_to_message_id, None)
                if node_id is not None:
                    answers[node_id] = take(_read(reply, names[node_id], node_id, down[node_id]))
            if len(pending) == before:
                in_vain += time.monotonic() - began
        if not pending or time.monotonic() >= ends:
            break
        if departure.is_certain(pending.values()):
            reason = "node left"
            break
        # where answers are large, a look is a call for every site: a thousand sites at work would leave no pause
        time.sleep(min(max(POLL_SECONDS, in_vain), max(0.0, ends - time.monotonic())))
    for node_id in pending.values():
        answers[node_id] = Answer(names[node_id], node_id, None, "missing", reason, down[node_id])
    return sorted(answers.values(), key=lambda answer: answer.site)


def site_record(answer: Answer) -> SiteRecord:
    """The beginning of a site's record: how it answered, and what that cost."""
    return SiteRecord(answer.site, answer.status, answer.reason, bytes_up=answer.bytes_up, bytes_down=answer.bytes_down)


@dataclass
class _Departure:
    """Notices that every node still waited for has left, which nobody needs to wait out to the deadline."""

    grid: Grid
    _next_look: float = field(default_factory=lambda: time.monotonic() + LOOK_SECONDS)
    _since: float | None = None

    def is_certain(self, node_ids: Collection[int]) -> bool:
        """Whether none of them has been connected for some seconds."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        if not set(self.grid.get_node_ids()).isdisjoint(node_ids):
            self._since = None
        elif self._since is None:
            self._since = now
        return self._since is not None and now - self._since >= LEFT_SECONDS


def _read(reply: Message, site: str, node_id: int, down: int) -> Answer:
    up = message_bytes(reply)
    if reply.has_error():
        # only a site's own reasons are known to be free of content and worth repeating; Flower's carry codes
        reason = reply.error.reason or f"error code {reply.error.code}"
        return Answer(site, node_id, None, "failed", reason[:500], down, up)
    try:
        payload = from_content(reply.content)
        for record in reply.content.values():
            record.clear()  # Flower's views of a message hold each other: its arrays would wait for the collector
    except Exception as error:  # bytes of a stranger: whatever is wrong with them is that site's failure, not the run's
        return Answer(site, node_id, None, "failed", f"unreadable answer: {type(error).__name__}", down, up)
    return Answer(site, node_id, payload, "ok", "", down, up)
