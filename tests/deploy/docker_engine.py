"""A Docker engine for tests, and the ways to one.

python tests/deploy/docker_engine.py     # starts one where there is none, and prints the script that did
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("messenger", "superlink", "server", "worker")
#: Built of what `docker-compose.yml` names, and thrown away with its volumes.
PROJECT = "fedgiva-test"

NO_ENGINE = (
    "no Docker engine: start one (`docker info` has to work, with compose), or let GIVA_TEST_ENGINE name a script that "
    "brings one up (`up`, `base REQUIREMENTS`, `env`); without one run `pytest -m 'not deploy'`"
)


@dataclass(frozen=True)
class Engine:
    """A Docker engine, and what its client has to have in its environment."""

    environment: dict[str, str]

    def run(self, *command: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command in the project's folder; with `check`, a failure shows what it said."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, errors="replace", timeout=timeout
        )
        if check and done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            pytest.fail(f"{shlex.join(command)} ended with {done.returncode}:\n{said}", pytrace=False)
        return done

    def compose(self, *command: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` on docker-compose.yml."""
        return self.run("docker", "compose", "--project-name", PROJECT, *command, check=check, timeout=timeout)


def script() -> Path | None:
    """The script that brings an engine up, where there is one."""
    named = os.environ.get("GIVA_TEST_ENGINE")
    script = Path(named) if named else ROOT.parent / "shared" / "ci" / "engine.sh"
    return script if script.is_file() else None


def is_there(environment: dict[str, str]) -> bool:
    """Whether a client with this environment finds an engine."""
    if shutil.which("docker", path=environment["PATH"]) is None:
        return False
    return subprocess.run(["docker", "info"], env=environment, capture_output=True).returncode == 0


def where(script: Path) -> dict[str, str]:
    """What a client has to have in its environment to find the script's engine."""
    shown = f'eval "$(bash {shlex.quote(str(script))} env)"; env -0'
    lines = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout.split("\0")
    return dict(line.split("=", 1) for line in lines if line.startswith("DOCKER_"))


def requirements() -> str:
    """What the images install, for an engine whose builds have no network."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, build = pyproject["project"], pyproject["build-system"]["requires"]
    constraints = f"-c {ROOT / 'constraints.txt'}"
    extras = project["optional-dependencies"]
    of_worker = [*project["dependencies"], *extras["site"], *extras["vision"]]
    return "\n".join([constraints, *of_worker, *build])


def call(script: Path, *arguments: str) -> None:
    """Call a step of the script; a failure shows the end of what it said."""
    with tempfile.TemporaryFile("w+") as said:  # a pipe would be held open by the engine that it leaves behind
        done = subprocess.run(["bash", str(script), *arguments], stdout=said, stderr=subprocess.STDOUT)
        said.seek(0)
        if done.returncode:
            pytest.fail(f"{script.name} {arguments[0]} failed:\n{said.read()[-3000:]}", pytrace=False)


def main() -> None:
    """Print the script that has started an engine, nothing where one was there; exit with the reason where none is."""
    path = script()
    if is_there(dict(os.environ)) or (path is not None and is_there({**os.environ, **where(path)})):
        return
    if path is None:
        sys.exit(NO_ENGINE)
    with tempfile.TemporaryFile("w+") as said:  # no pipe, as above
        steps = [
            subprocess.run(["bash", str(path), step], stdout=said, stderr=subprocess.STDOUT) for step in ("up", "base")
        ]
        if any(step.returncode for step in steps):
            said.seek(0)
            sys.exit(f"{path.name} brought up no Docker engine with a base image: {said.read().strip()[-500:]}")
    print(path)


if __name__ == "__main__":
    main()
