"""A federation of real processes on this machine: SuperLink with TLS and keys, the server, sites, commands."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from giva_core.config import RunConfig
from server.connections import toml_text
from server.run_store import RunStore

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
GIVA = (sys.executable, "-c", "from server.cli.main import main; main()")
PATIENCE_SECONDS = 240.0  # of a run of a second: the machine may be busy with much else

#: What an operator sets for every process of Flower's; see docs/deploy.md.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def need(*tools: str) -> None:
    """Fail where a program is missing that the test cannot do without."""
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.fail(f"this test needs {' and '.join(missing)}, which this machine does not have", pytrace=False)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_until(is_so: Callable[[], object], what: str, logs: Sequence[Program] = ()) -> None:
    """Wait for something that is looked for again and again; where it never comes, show the logs."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > ends:
            shown = "\n".join(f"--- {program.name}\n{program.log[-3000:]}" for program in logs)
            pytest.fail(f"{what}: not within {PATIENCE_SECONDS:g} s\n{shown}", pytrace=False)
        time.sleep(0.1)


class Program:
    """A program that runs until it is stopped, with a log."""

    def __init__(self, name: str, command: Sequence[object], environment: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.file = folder / f"{name}.{len(list(folder.glob(f'{name}.*.log'))) + 1}.log"
        with open(self.file, "xb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it has said."""
        return self.file.read_text(encoding="utf-8", errors="replace")

    def all_of_it(self) -> list[psutil.Process]:
        """It and what it has started."""
        try:
            process = psutil.Process(self.process.pid)
            return [found for found in (process, *process.children(recursive=True)) if not is_gone(found)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL, to everything of it at once."""
        for process in self.all_of_it():
            if process.is_running():
                process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and then what it takes; returns the exit code."""
        started = self.all_of_it()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        _, alive = psutil.wait_procs(started, timeout=10)
        for process in alive:
            process.kill()
        return self.process.wait()


class LiveFederation:
    """A SuperLink, a server and sites, in a folder.

    Args:
        folder: Where keys, states, logs and stores lie; its path has to be short enough for a Unix socket.
        model: A base model.
        data: A folder with one sub-folder for each site.
        tables: Further keys of the tables of every site's file.
    """

    def __init__(
        self, folder: Path, model: Path, data: Path, tables: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        need("openssl", "ssh-keygen")
        self.folder, self.model, self.data, self.tables = folder, model, data, tables or {}
        self.keys, self.port = folder / "keys", free_port()
        self.programs: dict[str, Program] = {}
        own = ("GIVA_SIMULATION", "GIVA_STORE", "GIVA_HOME", "GIVA_APP", "FLWR_HOME", "HF_HUB_OFFLINE")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in own},
            **QUIET,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "GIVA_HOME": str(folder / "operator"),
            "FLWR_HOME": str(folder / "flwr"),
            "GIVA_APP": str(ROOT),
        }
        self.store = RunStore(folder / "operator" / "store")

    @property
    def address(self) -> str:
        """Where the SuperLink listens."""
        return f"127.0.0.1:{self.port}"

    # -- certificates and commands -------------------------------------------------------------------------------------

    def make_certificates(self, *arguments: object) -> str:
        """Run the script; returns what it says."""
        script = ROOT / "deploy" / "make-certificates.sh"
        done = subprocess.run(["sh", script, self.keys, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def giva(self, *arguments: object, exit_code: int = 0) -> dict[str, Any]:
        """Run a command `giva ... --json`; returns its data."""
        command = [*GIVA, *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=self.folder)
        logs = "\n".join(f"--- {program.name}\n{program.log[-2000:]}" for program in self.programs.values())
        assert done.returncode == exit_code, f"giva {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}\n{logs}"
        data: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])["data"]
        return data

    # -- processes -----------------------------------------------------------------------------------------------------

    def start(self, name: str, *command: object, **environment: str) -> Program:
        """Start a program; one of that name has to be gone."""
        self.programs[name] = Program(name, command, {**self.environment, **environment}, self.folder)
        return self.programs[name]

    def start_superlink(self) -> Program:
        """Start the SuperLink, and wait until it is well."""
        program = self.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", self.port),
            *("--ssl-ca-certfile", self.keys / "ca.crt", "--ssl-certfile", self.keys / "server.crt"),
            *("--ssl-keyfile", self.keys / "server.key", "--enable-supernode-auth", "--isolation", "process"),
            *("--superexec-auth-secret-file", self.keys / "superexec.secret"),
            *("--database", self.folder / "superlink.sqlite"),
        )
        wait_until(lambda: self.listens() or program.process.poll() is not None, "the SuperLink starts", [program])
        assert program.process.poll() is None, program.log
        return program

    def listens(self) -> bool:
        """Whether the SuperLink's port is open; with a certificate of any kind."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def start_server(self) -> Program:
        """Start what runs ServerApps."""
        return self.start(
            "server",
            *("flower-superexec", "--runtime-api-address", self.address, "--root-certificates", self.keys / "ca.crt"),
            *("--superexec-auth-secret-file", self.keys / "superexec.secret"),
        )

    def site_file(self, site: str) -> Path:
        """Write a site's file."""
        folder = self.folder / site
        folder.mkdir(exist_ok=True)
        tables: dict[str, Any] = {
            "name": site,
            "data": {"folder": str(self.data / site)},
            "models": {self.model.name: {"path": str(self.model)}},
            "policy": {"max-sketch-share": 50.0, "allow-share-counts": True},  # the toy has layers of 16 columns
            "worker": {"socket": str(folder / "s"), "cache": str(folder / "cache"), "device": "cpu"},
            "superlink": {
                "address": self.address,
                "root-certificates": str(self.keys / "ca.crt"),
                "key": str(self.keys / f"{site}.key"),
            },
        }
        for title, more in self.tables.items():
            tables[title] = {**tables[title], **more}
        file = folder / "site.toml"
        file.write_text(toml_text(tables), encoding="utf-8")
        return file

    def start_site(self, site: str) -> Program:
        """Start a site as one: `giva site start`."""
        return self.start(site, *GIVA, "site", "start", self.site_file(site))

    def start_site_in_parts(self, site: str) -> list[Program]:
        """Start a site as two: its worker and its SuperNode."""
        file = self.site_file(site)
        return [self.start(f"{site}-worker", *GIVA, "site", "worker", file), self.start_supernode(site)]

    def start_supernode(self, site: str, *, key: Path | None = None, authority: Path | None = None) -> Program:
        """Start a site's SuperNode, as docs/deploy.md says."""
        socket_path = self.folder / site / "s"
        return self.start(
            f"{site}-messenger",
            *(sys.executable, ROOT / "client" / "prefork.py", "--"),
            *("flower-supernode", "--superlink", self.address, "--port", free_port()),
            *("--root-certificates", authority or self.keys / "ca.crt"),
            *("--auth-supernode-private-key", key or self.keys / f"{site}.key"),
            *("--node-config", f'worker="{socket_path}"'),
            FLWR_HOME=str(self.folder / site / "flwr"),
            FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1",
        )

    def wait_for(self, what: str, is_so: Callable[[], object]) -> None:
        """Wait for something to come about."""
        wait_until(is_so, what, list(self.programs.values()))

    def wait_for_sites(self, *sites: str) -> None:
        """Wait until their SuperNodes are in, and see that the operator is shown the same."""
        for site in sites:
            program = self.programs.get(f"{site}-messenger") or self.programs[site]
            self.wait_for(f"{site} comes online", lambda program=program: "SuperNode ID:" in program.log)
        listed = self.giva("site", "list")["sites"]
        assert set(sites) <= {entry["site"] for entry in listed if entry["status"] == "online"}

    def server_app(self) -> psutil.Process | None:
        """The process of the run."""
        found = [process for process in self.programs["server"].all_of_it() if "flwr-serverapp" in command_of(process)]
        return found[0] if found else None

    def stop(self) -> None:
        """Stop everything, what was started last first."""
        for program in reversed(list(self.programs.values())):
            if program.process.poll() is None:
                program.stop()


def run_file(folder: Path, config: RunConfig) -> Path:
    """A run's configuration as a TOML file."""
    tables: dict[str, Any] = {}
    for key, value in config.to_flat().items():
        section, _, name = key.rpartition(".")
        (tables.setdefault(section, {}) if section else tables)[name] = value
    file = folder / "run.toml"
    file.write_text(toml_text(tables), encoding="utf-8")
    return file


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; Flower's executor collects none of its children."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def command_of(process: psutil.Process) -> str:
    """The beginning of its command line; empty where it has ended."""
    try:
        return " ".join(process.cmdline()[:6])
    except psutil.Error:
        return ""
