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
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import uvicorn

Event = MutableMapping[str, Any]
#: Method and path, as they came, not decoded: nothing is let through that the SuperLink might read in another way.
ALLOWED = re.compile(rb"POST /v1/fleet/[a-z-]+|GET /health")
#: Flower cuts arrays into objects of 5 MB.
MAX_BODY_BYTES = 64 * 2**20
HOP_BY_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}
TIMEOUT_SECONDS = 120.0


class Gate:
    """An ASGI application that passes allowed requests to `client`, whose base address is the SuperLink's."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def __call__(
        self,
        scope: Event,
        receive: Callable[[], Awaitable[Event]],
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        status, headers, body = await self._answer(scope, receive)
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(
        self, scope: Event, receive: Callable[[], Awaitable[Event]]
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        if not ALLOWED.fullmatch(scope["method"].encode() + b" " + scope["raw_path"]) or scope["query_string"]:
            return 403, [], b"the gate lets only the Fleet API through\n"
        content = bytearray()
        more = True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return 400, [], b""
            content += event.get("body", b"")
            more = event.get("more_body", False)
            if len(content) > MAX_BODY_BYTES:
                return 413, [(b"connection", b"close")], b""
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP_BY_HOP | {b"host"}]
        request = self.client.build_request(
            scope["method"], scope["raw_path"].decode(), headers=headers, content=bytes(content)
        )
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                reply = await self.client.send(request, stream=True)
                try:
                    body = b"".join([chunk async for chunk in reply.aiter_raw()])
                finally:
                    await reply.aclose()
        except (httpx.HTTPError, TimeoutError):
            return 502, [], b"the SuperLink does not answer\n"
        kept = [(name.lower(), value) for name, value in reply.headers.raw if name.lower() not in HOP_BY_HOP]
        return reply.status_code, kept, body


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
            host=arguments.host,
            port=arguments.port,
            ssl_certfile=arguments.ssl_certfile,
            ssl_keyfile=arguments.ssl_keyfile,
            lifespan="off",
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            date_header=False,
            limit_concurrency=500,
        )
        await uvicorn.Server(config).serve()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="gate.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT")
    parser.add_argument("--root-certificates", required=True, metavar="CA.crt")
    parser.add_argument("--ssl-certfile", required=True)
    parser.add_argument("--ssl-keyfile", required=True)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8443)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
