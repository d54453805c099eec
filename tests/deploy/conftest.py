"""A Docker engine for the tests of the images and the stack, and the images themselves, built once."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_engine import NO_ENGINE, Engine, call, requirements, script


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The engine that is there, else one that a script brings up, and down again."""
    environment = dict(os.environ)
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        yield Engine(environment)
        return
    path = script()
    if path is None:
        pytest.fail(NO_ENGINE, pytrace=False)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder, "requirements.txt")
        wheels.write_text(requirements(), encoding="utf-8")
        call(path, "up")
        try:
            call(path, "base", str(wheels))
            shown = f'eval "$(bash {shlex.quote(str(path))} env)"; env -0'
            lines = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout.split("\0")
            where = dict(line.split("=", 1) for line in lines if line.startswith("DOCKER_"))
            yield Engine({**environment, "DOCKER_BUILDKIT": "0", **where})
        finally:
            call(path, "down")


@pytest.fixture(scope="session")
def images(engine: Engine) -> Engine:
    """The engine, with the images of docker-compose.yml built."""
    engine.compose("build", "--quiet", "superlink", "server", "site-1-messenger", "site-1-worker", timeout=1800)
    return engine
