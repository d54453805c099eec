"""The gate in front of a SuperLink: what it lets through, and how much of it at a time."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn
from docker_engine import ROOT


def load() -> ModuleType:
    """The program as a module: it belongs to no package."""
    spec = importlib.util.spec_from_file_location("deploy_gate", ROOT / "deploy" / "docker" / "gate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def through_gate(method: str, path: str, body: bytes = b"", **options: object) -> tuple[httpx.Response, list[str]]:
    """The gate's answer, and what reached a SuperLink that answers everything."""
    reached: list[str] = []

    def superlink(request: httpx.Request) -> httpx.Response:
        reached.append(f"{request.method} {request.url.raw_path.decode()}")
        body = request.content[::-1]

        async def stream() -> AsyncIterator[bytes]:
            yield body

        return httpx.Response(200, content=stream(), headers={"x-node": request.headers.get("x-node", "")})

    async def ask() -> httpx.Response:
        upstream = httpx.AsyncClient(transport=httpx.MockTransport(superlink), base_url="https://superlink:8000")
        async with upstream, httpx.AsyncClient(transport=httpx.ASGITransport(load().Gate(upstream))) as site:
            return await site.send(site.build_request(method, f"https://gate{path}", content=body, **options))

    return asyncio.run(ask()), reached


def test_gate_passes_the_fleet_api_on_with_its_headers() -> None:
    answer, reached = through_gate("POST", "/v1/fleet/pull-messages", b"abc", headers={"x-node": "signed"})
    assert (answer.status_code, answer.content, answer.headers["x-node"]) == (200, b"cba", "signed")
    assert reached == ["POST /v1/fleet/pull-messages"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "/v1/fleet/..%2fcontrol%2fstart-run"),
        ("POST", "/v1/fleet//v1/control/start-run"),
        ("POST", "/v1/fleet/pull-messages?next=/v1/control/start-run"),
        ("POST", "/V1/FLEET/pull-messages"),
        ("GET", "/v1/fleet/pull-messages"),
        ("GET", "/docs"),
        ("GET", "/"),
    ],
)
def test_gate_lets_nothing_else_through(method: str, path: str) -> None:
    answer, reached = through_gate(method, path)
    assert answer.status_code == 403
    assert reached == []


def test_gate_refuses_bodies_without_end() -> None:
    answer, reached = through_gate("POST", "/v1/fleet/push-object", bytes(load().MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert reached == []


def test_gate_says_when_the_superlink_is_away() -> None:
    async def ask() -> httpx.Response:
        def away(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        upstream = httpx.AsyncClient(transport=httpx.MockTransport(away), base_url="https://superlink:8000")
        async with upstream, httpx.AsyncClient(transport=httpx.ASGITransport(load().Gate(upstream))) as site:
            return await site.get("https://gate/health")

    assert asyncio.run(ask()).status_code == 502


def gate_answers(gate: object, *bodies: bytes, is_endless: bool = False) -> int:
    """The status that somebody gets who sends these pieces, and then either ends or falls silent."""
    events = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        if not events and is_endless:
            await asyncio.Event().wait()
        return events.pop(0) if events else {"type": "http.request", "body": b""}

    async def send(event: dict[str, object]) -> None:
        sent.append(event)

    scope = {"method": "POST", "raw_path": b"/v1/fleet/push-object", "query_string": b"", "headers": []}
    asyncio.run(gate({**scope, "client": ("192.0.2.7", 4)}, receive, send))  # type: ignore[operator]
    return int(str(sent[0]["status"]))


def test_gate_holds_so_much_of_all_bodies_and_half_of_it_of_one_address() -> None:
    module = load()
    module.BODIES_BYTES = 100
    upstream = httpx.AsyncClient(
        transport=httpx.MockTransport(lambda request: httpx.Response(200, stream=httpx.ByteStream(b"done"))),
        base_url="https://superlink:8000",
    )
    gate = module.Gate(upstream)
    assert gate_answers(gate, bytes(20), bytes(30)) == 200
    assert gate_answers(gate, bytes(20), bytes(31)) == 503
    gate.held["192.0.2.8"] = 90
    assert gate_answers(gate, bytes(10)) == 200
    assert gate_answers(gate, bytes(11)) == 503
    assert gate.held == {"192.0.2.8": 90}  # what was answered is forgotten


def test_gate_waits_for_no_body_for_ever() -> None:
    module = load()
    module.TIMEOUT_SECONDS = 0.01
    gate = module.Gate(httpx.AsyncClient(base_url="https://superlink:8000"))
    assert gate_answers(gate, b"ab", is_endless=True) == 408
    assert not gate.held


async def served_by_gate(module: ModuleType, visit: Callable[[Any, int], Awaitable[None]]) -> None:
    """What `visit` does at a port behind which everything is answered with 204, or with nothing at /silent."""

    async def answer(scope: dict[str, Any], receive: object, send: Callable[[object], Awaitable[None]]) -> None:
        if scope["path"] == "/silent":
            await asyncio.Event().wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(answer, http=module.Connection, lifespan="off", ws="none", log_config=None)
    config.timeout_graceful_shutdown = 1
    server, door = uvicorn.Server(config), module.Door("127.0.0.1", 0, per_client=2)
    serving = asyncio.create_task(server.serve([door]))
    try:
        while not server.started:
            await asyncio.sleep(0)
        await visit(door, door.getsockname()[1])
    finally:
        server.should_exit = True
        await serving


def test_gate_closes_what_one_address_opens_beyond_its_share() -> None:
    module = load()

    async def visit(door: Any, port: int) -> None:
        request = b"GET / HTTP/1.1\r\nHost: gate\r\n\r\n"
        streams = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            assert await reader.readline() == b"HTTP/1.1 204 No Content\r\n"
            streams.append(writer)
        assert door.visitors == {"127.0.0.1": 2}
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        for writer in streams:
            writer.close()
        while door.visitors:
            await asyncio.sleep(0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        assert (await reader.readline()).startswith(b"HTTP/1.1 204")
        writer.close()

    asyncio.run(asyncio.wait_for(served_by_gate(module, visit), 30))


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: gate\r\n\r\nGET", b"GET /silent HTTP/1.1\r\nHost: gate\r\n\r\n"],
)
def test_gate_ends_connections_of_the_silent(sent: bytes) -> None:
    module = load()
    module.HEADERS_SECONDS = module.REQUEST_SECONDS = 0.1

    async def visit(door: Any, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        with suppress(ConnectionResetError):
            assert (await reader.read()).count(b"204 No Content") == (b"GET / HTTP" in sent)
        writer.close()
        while door.visitors:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(served_by_gate(module, visit), 30))
