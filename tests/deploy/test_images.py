"""What the images are made of, and the small programs in them that belong to no package."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from docker_engine import IMAGES, ROOT, Engine

DOCKER = ROOT / "deploy" / "docker"


def load(name: str) -> ModuleType:
    """A program of deploy/docker as a module."""
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", DOCKER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the gate ---------------------------------------------------------------------------------------------------------


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
        async with upstream, httpx.AsyncClient(transport=httpx.ASGITransport(load("gate").Gate(upstream))) as site:
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
    answer, reached = through_gate("POST", "/v1/fleet/push-object", bytes(load("gate").MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert reached == []


def test_gate_says_when_the_superlink_is_away() -> None:
    async def ask() -> httpx.Response:
        def away(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        upstream = httpx.AsyncClient(transport=httpx.MockTransport(away), base_url="https://superlink:8000")
        async with upstream, httpx.AsyncClient(transport=httpx.ASGITransport(load("gate").Gate(upstream))) as site:
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
    module = load("gate")
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
    module = load("gate")
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
    module = load("gate")

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
    module = load("gate")
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


# -- the operator's first commands ------------------------------------------------------------------------------------

_GIVA = """#!/bin/sh
echo "$*" >>"$TOLD"
case "$*" in
"site list --all"*) cat "$SITES" ;;
esac
"""


def test_sites_are_approved_once_and_never_after_they_were_revoked(tmp_path: Path) -> None:
    keys, bin_folder, told = tmp_path / "keys", tmp_path / "bin", tmp_path / "told"
    keys.mkdir()
    bin_folder.mkdir()
    for number in range(1, 5):
        (keys / f"site-{number}.pub").write_text("key")
    status = {"site-1": "online", "site-3": "revoked"}
    sites = [{"site": name, "status": word} for name, word in status.items()]
    # one that came back with a new key, and one without a name
    sites += [{"site": "site-4", "status": "revoked"}, {"site": "site-4", "status": "never came"}]
    sites += [{"site": None, "status": "online"}]
    (tmp_path / "sites.json").write_text(json.dumps({"data": {"sites": sites}}))
    (bin_folder / "giva").write_text(_GIVA)
    (bin_folder / "giva").chmod(0o755)
    (bin_folder / "python").symlink_to(sys.executable)
    script = tmp_path / "approve.sh"
    script.write_text((DOCKER / "approve.sh").read_text(encoding="utf-8").replace("/etc/giva/*", f"{keys}/*"))
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "TOLD": str(told), "SITES": str(tmp_path / "sites.json")}
    done = subprocess.run(["sh", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    approved = [line for line in told.read_text().splitlines() if line.startswith("site approve")]
    assert approved == [f"site approve {keys}/site-2.pub --name site-2 --superlink demo"]
    assert done.stderr.startswith("site-3 was revoked") and done.stderr.count("\n") == 1


# -- health checks, requirements, keys --------------------------------------------------------------------------------


class _Sick(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def health(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-I", DOCKER / "health.py", *arguments], capture_output=True).returncode


def test_health_of_http_tcp_and_unix_sockets(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Sick)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    path = str(tmp_path / "worker.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert health(f"http://127.0.0.1:{port}/health") == 0
        assert health(f"http://127.0.0.1:{port}/sick") == 1
        assert health(f"127.0.0.1:{port}") == 0
        assert health(path) == 0
    server.shutdown()
    server.server_close()
    assert health(path) == 1
    assert health(f"127.0.0.1:{port}") == 1


def requirements(*wanted: str) -> subprocess.CompletedProcess[str]:
    """What pip is given for an image with these extras."""
    command = [sys.executable, DOCKER / "requirements.py", *wanted]
    with (ROOT / "pyproject.toml").open() as stream:
        return subprocess.run(command, stdin=stream, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("wanted", ["flwr", "base", "site"])
def test_requirements_are_those_of_the_project(wanted: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    done = requirements(wanted)
    lines, base = set(done.stdout.splitlines()), set(project["dependencies"])
    flwr = {line for line in base if line.startswith("flwr")}
    assert lines == {"flwr": flwr, "base": base, "site": base | set(project["optional-dependencies"]["site"])}[wanted]
    assert any(line.startswith("torch") for line in lines) == (wanted == "site")


def test_a_worker_gets_the_extras_that_its_operator_names() -> None:
    plain, more = (set(requirements("site", "vision", *extras).stdout.splitlines()) for extras in ((), ("peft",)))
    [added] = more - plain  # the extra names `fedgiva[site]`, too, which no index has
    assert plain < more and added.startswith("peft")
    unknown = requirements("site", "vision", "pefft")
    assert unknown.returncode == 1 and "there is no extra 'pefft', only site, " in unknown.stderr


@pytest.mark.parametrize("file", ["docker-compose.yml", "deploy/compose.site.yml", "deploy/compose.gpu.yml"])
def test_a_worker_s_extras_are_named_in_the_environment(file: str) -> None:
    assert "EXTRAS: ${EXTRAS:-}" in (ROOT / file).read_text(encoding="utf-8").replace('"', "")


def test_keys_made_without_openssh_are_like_its_own(tmp_path: Path) -> None:
    key = tmp_path / "site"
    command = [
        sys.executable,
        DOCKER / "ssh-keygen",
        "-q",
        "-t",
        "ecdsa",
        "-b",
        "384",
        "-N",
        "",
        "-C",
        "site-1",
        "-f",
        key,
    ]
    subprocess.run(command, check=True)
    private = load_ssh_private_key(key.read_bytes(), None)
    text = key.with_suffix(".pub").read_bytes()
    assert private.public_key() == load_ssh_public_key(text)
    assert text.split()[2] == b"site-1"
    assert key.stat().st_mode & 0o777 == 0o600
    assert subprocess.run(command, capture_output=True).returncode == 1  # it does not write over a key
    if shutil.which("ssh-keygen"):
        derived = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, check=True).stdout
        assert derived.split()[:2] == text.split()[:2]


# -- the Dockerfile and what it builds --------------------------------------------------------------------------------


@pytest.mark.deploy
def test_dockerfile_is_clean() -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=places)
    if hadolint is None:
        pytest.skip("needs the extra `deploy`: hadolint")
    done = subprocess.run([hadolint, "deploy/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerfile_needs_no_newer_builder() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert "--mount" not in text and "# syntax" not in text and "<<" not in text


def inside(engine: Engine, image: str, code: str) -> str:
    """What Python code prints in a container that has nothing: no network, no powers, nothing to write to."""
    options = ["--rm", "--read-only", "--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    return engine.run("docker", "run", *options, "--entrypoint=python", f"fedgiva/{image}:0.1.0", "-c", code).stdout


@pytest.mark.deploy
@pytest.mark.parametrize("image", IMAGES)
def test_image_is_modest(images: Engine, image: str) -> None:
    config = json.loads(images.run("docker", "inspect", f"fedgiva/{image}:0.1.0").stdout)[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "python", "-I"]
    settings = dict(item.split("=", 1) for item in config["Env"])
    assert settings["FLWR_TELEMETRY_ENABLED"] == "0"
    assert settings["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert settings["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


@pytest.mark.deploy
@pytest.mark.parametrize(
    ("image", "has", "has_not"),
    [
        ("messenger", ["flwr", "grpc", "numpy"], ["torch", "transformers", "giva_core", "client", "pip", "uv"]),
        ("superlink", ["flwr", "httpx", "uvicorn"], ["torch", "transformers", "giva_core", "server", "pip", "uv"]),
        ("server", ["flwr", "giva_core", "server", "client", "pip"], ["torch", "transformers", "uv"]),
        ("worker", ["torch", "transformers", "giva_core", "client"], ["pip", "uv"]),
    ],
)
def test_image_holds_what_it_needs_and_no_more(images: Engine, image: str, has: list[str], has_not: list[str]) -> None:
    code = f"from importlib.util import find_spec as f; print([m for m in {has + has_not} if f(m)])"
    assert inside(images, image, code).strip() == str(has)


@pytest.mark.deploy
def test_worker_image_builds_the_same_bases(images: Engine) -> None:
    options = ["--rm", "--read-only", "--network=none", "--tmpfs=/tmp", "--entrypoint=giva"]
    done = images.run("docker", "run", *options, "fedgiva/worker:0.1.0", "bases", "self-test", "--json")
    assert json.loads(done.stdout)["data"]["passed"]
