"""The call itself: gRPC over a Unix socket. Knows the names of the methods and how long a message may be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc

from giva_core.errors import GivaError, ProtocolError

from . import worker_pb2 as pb
from .codec import WIRE_VERSION

SERVICE = "fedgiva.worker.v1.Worker"

# How long a message the worker takes is its site's to say. Its answers are trusted.
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]
_PAUSE_SECONDS = 0.3

#: Raw bytes in, raw bytes out: what cannot be read is answered by the worker, and not logged by gRPC.
Method = Callable[[bytes, grpc.ServicerContext], bytes]


class WorkerAbsentError(GivaError):
    """Nobody listens at the worker's socket."""

    kind = "worker"


def address(socket: Path | str) -> str:
    """The socket as gRPC names it."""
    return f"unix:{socket}"


def add_to_server(server: grpc.Server, ask: Method, status: Method) -> None:
    """Let `server` answer the two methods of the service."""
    handlers = {
        "Ask": grpc.unary_unary_rpc_method_handler(ask),
        "Status": grpc.unary_unary_rpc_method_handler(status),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def server_options(message_bytes: int) -> list[tuple[str, Any]]:
    """How a gRPC server of this service is set up that takes messages of so many bytes at most."""
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
    ]


class Link:
    """A connection to a worker, for use in a `with` statement.

    Args:
        socket: The worker's Unix socket.
        patience_seconds: How long to go on trying while nobody listens: the worker may be restarting.
    """

    def __init__(self, socket: Path | str, patience_seconds: float = 0.0) -> None:
        self._patience = patience_seconds
        self._channel = grpc.insecure_channel(address(socket), options=_CHANNEL_OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def ask(self, request: pb.Request, timeout_seconds: float | None = None) -> pb.Reply:
        """Ask the worker to work on a message.

        Raises:
            WorkerAbsentError: Nobody listens, or the answer did not come in time.
            ProtocolError: The message is longer than the worker takes.
        """
        request.protocol = WIRE_VERSION
        return self._call("Ask", request, pb.Reply, timeout_seconds)

    def status(self, timeout_seconds: float = 10.0) -> pb.StatusReply:
        """What the worker is doing; raises WorkerAbsentError as `ask` does."""
        return self._call("Status", pb.StatusRequest(protocol=WIRE_VERSION), pb.StatusReply, timeout_seconds)

    def _call(self, method: str, request: Any, reply: Any, timeout: float | None) -> Any:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, reply.FromString)
        ends = time.monotonic() + self._patience
        while True:
            try:
                return call(request, timeout=timeout)
            except grpc.RpcError as error:
                code = error.code()
                if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
                    raise _too_long(request.ByteSize()) from None
                if code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() >= ends:
                    raise WorkerAbsentError(
                        "the site's worker does not answer",
                        got=code.name,
                        cause="it is not started, or started with another site file",
                        remedy="start it with `giva site worker SITE.toml`, or `giva site start SITE.toml`",
                        public="the site's worker does not answer",
                    ) from None
            time.sleep(_PAUSE_SECONDS)


def _too_long(size: int) -> ProtocolError:
    return ProtocolError(
        "the message is longer than this site's worker takes",
        got=f"{size / 2**20:.0f} MiB",
        cause="the method trains more numbers than the site's operator reckoned with",
        remedy="raise worker.message-mib in the site file, or lower the run's wire.precision or its number of targets",
        public="the message is longer than the site's message-mib",
    )
