"""What the images are made of, and the small programs in them that belong to no package; the gate has its own file."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from docker_engine import IMAGES, ROOT, Engine

DOCKER = ROOT / "deploy" / "docker"


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
