"""The command `flwr`, as a subprocess that answers in JSON: the one place that runs it.

Flower's own library for this is internal; its command line is public, and so is the JSON it answers with. What it says
of a failure is translated into what the operator can do about it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giva_core.config import RunConfig
from giva_core.errors import ConfigError, DependencyError

from .connections import Connection, SuperLinkError, diagnose, find_connection, toml_text

#: Flower reports home, looks for updates and installs packages unless told not to; all of its processes get this.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_CALL_SECONDS = 180.0  # sending an app bundle over a slow line takes its time

# Flower's error codes, flwr/supercore/error/base.py
_RUN_UNKNOWN, _RUN_FINISHED, _KEY_INVALID, _KEY_USED, _NODE_UNKNOWN = 16, 18, 22, 23, 24


@dataclass(frozen=True)
class Node:
    """A SuperNode that was registered.

    Attributes:
        node_id: Flower's id, as text: it does not fit into a JSON number.
        status: `registered` (has never come), `online`, `offline` or `unregistered` (revoked).
        registered: UTC.
        online: When it came last; empty if never.
        offline: When it left last; empty if never.
    """

    node_id: str
    status: str
    registered: str
    online: str
    offline: str


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink as its operator sees it.

    Attributes:
        connection: How it is reached.
    """

    connection: Connection

    @classmethod
    def find(cls, name: str | None) -> SuperLink:
        """The SuperLink of a connection's name, or of the default connection."""
        return cls(find_connection(name))

    # -- sites ---------------------------------------------------------------------------------------------------------

    def register(self, public_key: Path, site: str) -> str:
        """Let the owner of a key join; returns the id of its node.

        Raises:
            ConfigError: The file is no public key that Flower takes.
            SuperLinkError: The key was registered before, or the SuperLink cannot be reached.
        """
        _check_public_key(public_key)
        answer = self._call("supernode", "register", str(public_key.resolve()), self.connection.name, "--name", site)
        return str(answer["node-id"])

    def nodes(self) -> list[Node]:
        """All nodes that were ever registered, oldest first."""
        answer = self._call("supernode", "list", self.connection.name, "--verbose")

        def when(entry: Mapping[str, Any], key: str) -> str:
            return "" if entry[key] == "N/A" else str(entry[key])

        return [
            Node(
                str(entry["node-id"]),
                str(entry["status"]),
                when(entry, "created-at"),
                when(entry, "online-at"),
                when(entry, "offline-at"),
            )
            for entry in answer["nodes"]
        ]

    def unregister(self, node_id: str) -> None:
        """Throw a node out for good; its key is never taken again."""
        self._call("supernode", "unregister", node_id, self.connection.name)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def start_run(self, app: Path, config: RunConfig) -> str:
        """Submit a run of the app in a folder; returns Flower's id of it.

        Every setting is sent, so that what runs does not depend on the defaults in the app's pyproject.toml.
        """
        with tempfile.TemporaryDirectory(prefix="giva-run-") as folder:
            file = Path(folder) / "run.toml"
            file.write_text(toml_text(_nested(config.to_flat())), encoding="utf-8")
            answer = self._call("run", str(app), self.connection.name, "--run-config", str(file))
        return str(answer["run-id"])

    def stop_run(self, flower_run_id: str) -> bool:
        """End a run; False where it has ended before, or where this SuperLink does not know it (any more)."""
        try:
            self._call("stop", flower_run_id, self.connection.name)
        except SuperLinkError as error:
            if _code(str(error.got)) in (_RUN_UNKNOWN, _RUN_FINISHED):
                return False
            raise
        return True

    def run_status(self, flower_run_id: str) -> str:
        """`pending`, `starting`, `running`, `finished:completed`, `finished:failed`, `finished:stopped`, or empty."""
        try:
            answer = self._call("list", self.connection.name, "--run-id", flower_run_id)
        except SuperLinkError as error:
            if _code(str(error.got)) == _RUN_UNKNOWN:
                return ""
            raise
        return str(answer["runs"][0]["status"])

    def stream_log(self, flower_run_id: str) -> None:
        """Show the log of a run on stderr until the run has ended."""
        command = [_command(), "log", flower_run_id, self.connection.name, "--stream"]
        done = subprocess.run(command, stdout=sys.stderr, env=_environment())
        if done.returncode:
            raise SuperLinkError(
                f"the log of run {flower_run_id} broke off",
                got=f"exit code {done.returncode} of flwr log",
                cause="the SuperLink was stopped, or cannot be reached any more",
                remedy="the run itself may go on: see `giva run list`",
            )

    # -- the command ---------------------------------------------------------------------------------------------------

    def _call(self, *arguments: str) -> dict[str, Any]:
        command = [_command(), *arguments, "--format", "json"]
        name = " ".join(command[1:3] if arguments[0] == "supernode" else command[1:2])
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_CALL_SECONDS,
                env=_environment(),
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            diagnose(self.connection)
            raise SuperLinkError(
                f"`flwr {name}` did not come back",
                got=f"nothing within {_CALL_SECONDS:g} s",
                cause=f"the SuperLink {self.connection.address} is overloaded",
                remedy="look at the SuperLink's log, then try again",
            ) from error
        answer = _read_json(done.stdout)
        if answer.get("success") is True:
            return answer
        raise self._failure(name, str(answer.get("error-message") or done.stderr or done.stdout))

    def _failure(self, name: str, text: str) -> SuperLinkError | ConfigError:
        lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
        said = lines[-1] if lines else "nothing"
        code = _code(said)
        at = f"SuperLink {self.connection.name}"
        if "is unavailable" in said or "certificate file" in said:
            diagnose(self.connection)  # raises with the reason, where there still is one
            return SuperLinkError(
                f"{at} was not there for a moment", got=said, cause="it was just being started", remedy="try again"
            )
        if code == _KEY_USED:
            return SuperLinkError(
                f"{at} knows this key",
                got=said,
                cause="the site was approved before, or was revoked: a key that was revoked is never taken again",
                remedy="see `giva site list`; where it was revoked, let the site make a new key pair",
            )
        if code == _KEY_INVALID:
            return ConfigError(f"{at} does not take this key", got=said, remedy=_MAKE_KEY)
        if code == _NODE_UNKNOWN:
            return SuperLinkError(f"{at} knows no such site", got=said, remedy="see `giva site list`")
        return SuperLinkError(f"`flwr {name}` failed at {at}", got=" ".join(lines[-5:])[:1000])


_MAKE_KEY = 'make one with `ssh-keygen -t ecdsa -b 384 -N "" -f site.key`, and approve site.key.pub'


def _check_public_key(file: Path) -> None:
    """Refuse what is no public key of an elliptic curve, a private key above all, before anything is sent."""
    try:
        text = file.read_text(encoding="ascii")
    except FileNotFoundError:
        raise ConfigError(f"there is no key {file}", remedy="check the path; " + _MAKE_KEY) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key {file} cannot be read", got=error, remedy=_MAKE_KEY) from error
    if "PRIVATE KEY" in text:
        raise ConfigError(
            f"{file} is a private key",
            expected="the site's public key, a file that ends in .pub",
            cause="the wrong file of the two was named, or sent",
            remedy="if it has left the site, make a new pair: this one is no secret any more",
        )
    if not text.startswith("ecdsa-sha2-nistp"):
        raise ConfigError(
            f"{file} is no public key that Flower takes",
            got=repr(text[:24]),
            expected="a line that begins with ecdsa-sha2-nistp384",
            remedy=_MAKE_KEY,
        )


def app_folder(given: Path | None) -> Path:
    """The folder of the Flower app: `given`, `$GIVA_APP`, the working directory, or where this package lies.

    Raises:
        ConfigError: None of them holds a pyproject.toml with [tool.flwr.app].
    """
    if given is not None or os.environ.get("GIVA_APP"):
        folder = Path(given or os.environ["GIVA_APP"]).expanduser().resolve()
        if _is_app(folder):
            return folder
        raise ConfigError(
            f"{folder} is no Flower app",
            expected="a folder with a pyproject.toml that has a table [tool.flwr.app]",
            remedy="name the folder of the project's source with --app or GIVA_APP",
        )
    looked = [Path.cwd(), Path(__file__).resolve().parents[1]]
    for folder in looked:
        if _is_app(folder):
            return folder
    raise ConfigError(
        "the Flower app that is to be run was not found",
        got=f"no pyproject.toml with [tool.flwr.app] in {' or '.join(map(str, looked))}",
        cause="the project was installed from a wheel, which holds no pyproject.toml",
        remedy="name the folder of the project's source with --app or GIVA_APP",
    )


def _is_app(folder: Path) -> bool:
    import tomllib

    try:
        content = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False
    return isinstance(content.get("tool", {}).get("flwr", {}).get("app"), dict)


def _command() -> str:
    beside = Path(sys.executable).with_name("flwr")  # the environment that runs us, active or not
    found = str(beside) if beside.exists() else shutil.which("flwr")
    if not found:
        raise DependencyError("the command flwr is not installed", remedy="install this project again, with pip")
    return found


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    return {**kept, **QUIET, "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}


def _read_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text[text.index("{") :])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _code(text: str) -> int | None:
    found = re.search(r"\[code: (\d+)\]", text)
    return int(found[1]) if found else None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (tables.setdefault(section, {}) if section else tables)[name] = value
    return tables
