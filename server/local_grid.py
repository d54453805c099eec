"""Flower's Grid without processes: every message is really serialised, and a ClientApp in this process answers it.

Shared objects would hide bugs and make byte counts up, so messages and replies pass through Flower's own protobuf form.
All sites share whatever the ClientApp keeps in its process: one frozen model serves a hundred of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

App = Callable[[Message, Context], Message]

_RUN_ID = 1
_SERVER_NODE_ID = 1  # Flower's own number for the server


class LocalGrid(Grid):
    """A grid whose nodes are contexts in this process.

    Args:
        app: The ClientApp.
        node_configs: Each node's own configuration, by node id.
        run_config: The run's flat configuration, as every node receives it.
    """

    def __init__(self, app: App, node_configs: Mapping[int, Mapping[str, Any]], run_config: Mapping[str, Any]) -> None:
        # Flower sets these when it starts a process for an app; messages cannot be made without them
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, _RUN_ID, _SERVER_NODE_ID
        self._app = app
        self._contexts = {
            node_id: Context(_RUN_ID, node_id, dict(config), RecordDict(), dict(run_config))
            for node_id, config in node_configs.items()
        }
        self._run = Run.create_empty(_RUN_ID)
        self._waiting: dict[str, Message] = {}

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are pulled.

        They are serialised only then: questions to a hundred sites share one content, their bytes would not.
        """
        waiting = {secrets.token_hex(16): message for message in messages}
        self._waiting.update(waiting)
        return list(waiting)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the nodes answer, one after the other, as each reply is asked for."""
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                proto = message_to_proto(message)
                proto.metadata.message_id = message_id
                yield self._answer(proto.SerializeToString())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull in one call."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _answer(self, wire: bytes) -> Message:
        message = _parse(wire)
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._app(message, context)
        except Exception as error:  # as Flower's own process does: an error reply, not a dead federation
            reply = Message(Error(1, type(error).__name__), reply_to=message)
        return _parse(message_to_proto(reply).SerializeToString())


def _parse(wire: bytes) -> Message:
    return message_from_proto(ProtoMessage.FromString(wire))
