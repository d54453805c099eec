"""A Docker engine for the tests of the images and the stack, and the images themselves, built once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_engine import NO_ENGINE, Engine, call, is_there, requirements, script, where


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The engine that is there, else one that a script brings up, and down again if it did."""
    if is_there(dict(os.environ)):
        yield Engine(dict(os.environ))
        return
    path = script()
    if path is None:
        pytest.fail(NO_ENGINE, pytrace=False)
    environment = {**os.environ, "DOCKER_BUILDKIT": "0", **where(path)}
    was_there = is_there(environment)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder, "requirements.txt")
        wheels.write_text(requirements(), encoding="utf-8")
        call(path, "up")
        try:
            call(path, "base", str(wheels))
            yield Engine(environment)
        finally:
            if not was_there:
                call(path, "down")


@pytest.fixture(scope="session")
def images(engine: Engine) -> Engine:
    """The engine, with the images of docker-compose.yml built."""
    engine.compose("build", "--quiet", "superlink", "server", "site-1-messenger", "site-1-worker", timeout=1800)
    return engine
