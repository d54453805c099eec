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
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import httpx
import pytest
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


@pytest.mark.parametrize("wanted", ["flwr", "base", "site"])
def test_requirements_are_those_of_the_project(wanted: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with (ROOT / "pyproject.toml").open() as stream:
        done = subprocess.run(
            [sys.executable, DOCKER / "requirements.py", wanted],
            stdin=stream,
            capture_output=True,
            text=True,
            check=True,
        )
    lines, base = set(done.stdout.splitlines()), set(project["dependencies"])
    flwr = {line for line in base if line.startswith("flwr")}
    assert lines == {"flwr": flwr, "base": base, "site": base | set(project["optional-dependencies"]["site"])}[wanted]
    assert any(line.startswith("torch") for line in lines) == (wanted == "site")


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
