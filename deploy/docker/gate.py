"""The door of the SuperLink for sites: passes Flower's Fleet API on, and nothing else.

    gate.py --superlink superlink:8000 --root-certificates ca.crt --ssl-certfile server.crt --ssl-keyfile server.key

Flower serves three interfaces on one port. The Fleet API asks every site for its key; the Control API, which registers
keys and starts runs, asks a caller for nothing, and the Runtime API, which hands out their work, for a secret at most.
Where sites can reach that port, each of them can approve whom it likes and run code at the server. So they reach this
one instead. Needs what flwr brings.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

Event = MutableMapping[str, Any]
#: Method and path, as they came, not decoded: nothing is let through that the SuperLink might read in another way.
ALLOWED = re.compile(rb"POST /v1/fleet/[a-z-]+|GET /health")
#: Flower cuts arrays into objects of 5 MB.
MAX_BODY_BYTES = 64 * 2**20
#: What all bodies together may hold, from their first byte until they are answered; one address gets half.
BODIES_BYTES = 2 * MAX_BODY_BYTES
PIECE_BYTES = 64 * 2**10
HOP_BY_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}

HEADERS_SECONDS = 20.0
#: For a body to come in, and then for the SuperLink to answer.
TIMEOUT_SECONDS = 120.0
REQUEST_SECONDS = 3 * TIMEOUT_SECONDS
MAX_CONNECTIONS = 500
PER_CLIENT = 32


class RefusedError(Exception):
    """An answer of the gate's own: status and text."""


class Gate:
    """An ASGI application that passes allowed requests to `client`, whose base address is the SuperLink's."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.held: Counter[str] = Counter()  # bytes of bodies, by address

    async def __call__(
        self,
        scope: Event,
        receive: Callable[[], Awaitable[Event]],
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        address = (scope["client"] or ("",))[0]
        content = bytearray()
        try:
            if not ALLOWED.fullmatch(scope["method"].encode() + b" " + scope["raw_path"]) or scope["query_string"]:
                raise RefusedError(403, b"the gate lets only the Fleet API through\n")
            await self._read(receive, address, content)
            await self._pass_on(scope, content, send)
        except RefusedError as refused:
            status, text = refused.args
            headers = [(b"content-length", str(len(text)).encode()), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text})
        finally:
            self.held[address] -= len(content)
            self.held += Counter()  # forgets who holds nothing

    async def _read(self, receive: Callable[[], Awaitable[Event]], address: str, content: bytearray) -> None:
        more = True
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while more:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise RefusedError(400, b"")
                    body = event.get("body", b"")
                    more = event.get("more_body", False)
                    content += body
                    self.held[address] += len(body)
                    if len(content) > MAX_BODY_BYTES:
                        raise RefusedError(413, b"")
                    if self.held[address] > BODIES_BYTES // 2 or self.held.total() > BODIES_BYTES:
                        raise RefusedError(503, b"the gate holds too much already\n")
        except TimeoutError:
            raise RefusedError(408, b"") from None

    async def _pass_on(self, scope: Event, content: bytearray, send: Callable[[Event], Awaitable[None]]) -> None:
        dropped = HOP_BY_HOP | {b"host", b"content-length"}
        headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
        headers.append((b"content-length", str(len(content)).encode()))
        request = self.client.build_request(
            scope["method"], scope["raw_path"].decode(), headers=headers, content=_pieces(content)
        )
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                reply = await self.client.send(request, stream=True)
        except (httpx.HTTPError, TimeoutError):
            raise RefusedError(502, b"the SuperLink does not answer\n") from None
        kept = [(name.lower(), value) for name, value in reply.headers.raw if name.lower() not in HOP_BY_HOP]
        await send({"type": "http.response.start", "status": reply.status_code, "headers": kept})
        try:
            async for chunk in reply.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.HTTPError:
            return  # the answer has begun: uvicorn ends the connection, so that half of it is not taken for all
        finally:
            await reply.aclose()
        await send({"type": "http.response.body", "body": b""})


async def _pieces(content: bytearray) -> AsyncIterator[bytes]:
    """The body in pieces: as a whole, it would be copied by httpx and once more by TLS."""
    for begin in range(0, len(content), PIECE_BYTES):
        yield bytes(content[begin : begin + PIECE_BYTES])


class Connection(H11Protocol):
    """Ends a connection on which no request begins in HEADERS_SECONDS, or on which one takes REQUEST_SECONDS.

    uvicorn itself limits nothing but the silence between two requests: neither how long the first may wait, nor slow
    headers, nor a client that does not read its answer. h11, unlike httptools, limits the length of headers.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """TLS is agreed on."""
        super().connection_made(transport)
        self._expect(HEADERS_SECONDS, None)

    def on_response_complete(self) -> None:
        """A request is answered; another may follow."""
        answered = self.cycle
        super().on_response_complete()
        self._expect(HEADERS_SECONDS, answered)

    def connection_lost(self, exc: Exception | None) -> None:
        """Its end."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def _expect(self, seconds: float, last: RequestResponseCycle | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._late, last)

    def _late(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last:
            self.transport.abort()
        else:
            self._expect(REQUEST_SECONDS, self.cycle)


class Door(socket.socket):
    """A listening socket that closes at once what one address opens beyond its share.

    Counted here are connections without TLS, too. uvicorn sees them after the handshake only, and cannot be told how
    long that may take: asyncio's own limit holds, 60 s. A connection has one request at a time, so this limits those.
    """

    def __init__(self, host: str, port: int, per_client: int = PER_CLIENT) -> None:
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.bind((host, port))
        self.visitors: Counter[str] = Counter()
        self._per_client = per_client

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that may stay; raises ConnectionAbortedError, which asyncio knows, for any other."""
        connection, address = super().accept()
        name = address[0]
        if self.visitors[name] >= self._per_client or self.visitors.total() >= MAX_CONNECTIONS:
            connection.close()
            raise ConnectionAbortedError
        self.visitors[name] += 1
        return _Visitor(connection, self.visitors, name), address


class _Visitor(socket.socket):
    """A connection that is counted until it is closed."""

    def __init__(self, connection: socket.socket, visitors: Counter[str], name: str) -> None:
        super().__init__(connection.family, connection.type, connection.proto, connection.detach())
        self._visitors, self._name = visitors, name

    def close(self) -> None:
        if self.fileno() >= 0:
            self._visitors[self._name] -= 1
            if not self._visitors[self._name]:
                del self._visitors[self._name]
        super().close()


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    verify = ssl.create_default_context(cafile=arguments.root_certificates)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
    async with httpx.AsyncClient(
        base_url=f"https://{arguments.superlink}",
        verify=verify,
        timeout=TIMEOUT_SECONDS,
        limits=limits,
        trust_env=False,
    ) as client:
        config = uvicorn.Config(
            Gate(client),
            http=Connection,
            ssl_certfile=arguments.ssl_certfile,
            ssl_keyfile=arguments.ssl_keyfile,
            lifespan="off",
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            date_header=False,
        )
        door = Door(arguments.host, arguments.port, arguments.per_client)
        await uvicorn.Server(config).serve([door])


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="gate.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT")
    parser.add_argument("--root-certificates", required=True, metavar="CA.crt")
    parser.add_argument("--ssl-certfile", required=True)
    parser.add_argument("--ssl-keyfile", required=True)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8443)
    parser.add_argument(
        "--per-client",
        type=int,
        default=PER_CLIENT,
        metavar="N",
        help="connections of one address; more where a load balancer hides the sites' own (default: %(default)s)",
    )
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
