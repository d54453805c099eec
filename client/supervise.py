"""Keep a site's programs running: restart with back-off, one clean stop of all of them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from giva_core.errors import ConfigError, DependencyError

from .site_file import SiteFile, SuperLinkSettings

_PACKAGES = Path(__file__).resolve().parents[1]
_PREFORK = Path(__file__).resolve().with_name("prefork.py")
_STOP_SECONDS = 20.0
_CALM_SECONDS = 60.0  # a program that lived so long begins with the shortest pause again
_LONGEST_PAUSE_SECONDS = 60.0

#: What a SuperNode may know of this process's environment: how to find its programs, folders, proxies, certificates.
_PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
    *(
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
    ),
)
_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}

log = logging.getLogger("giva.site")


@dataclass(frozen=True)
class Program:
    """One program to keep running.

    Attributes:
        name: What the log calls it.
        command: Its command line.
        environment: Its whole environment.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)


def site_programs(site_file: Path) -> list[Program]:
    """The worker and the SuperNode of a site.

    Raises:
        ConfigError: The site file cannot be used, or does not say where to connect to.
        DependencyError: Flower is not installed.
    """
    path = site_file.resolve()
    site = SiteFile.read(path)
    # Flower finds its own programs through PATH, and an environment need not be activated
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    supernode = shutil.which("flower-supernode", path=paths)
    if supernode is None:
        raise DependencyError("there is no flower-supernode here", remedy="pip install 'fedgiva[site]'")
    worker = (sys.executable, "-P", "-m", "client.worker", str(path))
    node_config = f"worker={json.dumps(site.worker.socket)}"
    messenger = (
        *(sys.executable, str(_PREFORK), "--", supernode),
        *_connection(site.superlink),
        *("--node-config", node_config),
        *("--host", "127.0.0.1", "--port", str(_free_port())),
    )
    flower = {name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith("FLWR_")}
    return [
        Program("worker", worker, {**os.environ, "PYTHONPATH": str(_PACKAGES)}),
        Program("supernode", messenger, {**flower, **_FLOWER, "PATH": paths}),
    ]


def _free_port() -> int:
    """A port for the SuperNode's own processes; its usual one may be another site's on the same machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _connection(superlink: SuperLinkSettings) -> list[str]:
    if not superlink.address:
        raise ConfigError(
            "the site file does not say where to connect to",
            expected="superlink.address = HOST:PORT",
            remedy="add it, or run the parts of the site apart: `giva site worker`, `flower-supernode`",
        )
    arguments = ["--superlink", superlink.address]
    if superlink.insecure:
        log.warning("superlink.insecure = true: whoever is on the way to %s reads and changes all", superlink.address)
        arguments.append("--insecure")
    elif superlink.root_certificates:
        arguments += ["--root-certificates", superlink.root_certificates]
    if superlink.key:
        arguments += ["--auth-supernode-private-key", superlink.key]
    return arguments


def supervise(programs: Sequence[Program], stop: threading.Event | None = None, shortest_pause: float = 1.0) -> int:
    """Run programs until SIGTERM or SIGINT, and start again what ends: after 1, 2, 4, ... 60 seconds.

    Args:
        programs: What to run.
        stop: Ends everything where it is set; signals set it where this is the main thread.
        shortest_pause: Seconds before the first restart.

    Returns:
        The exit code, 0.
    """
    stop = stop or threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    keepers = [
        threading.Thread(target=_keep, args=(program, stop, shortest_pause), name=program.name) for program in programs
    ]
    for keeper in keepers:
        keeper.start()
    while not stop.wait(0.5):
        pass  # a signal may reach another thread, and this one is not woken then
    for keeper in keepers:
        keeper.join()
    return 0


def _keep(program: Program, stop: threading.Event, shortest_pause: float) -> None:
    pause = shortest_pause
    while not stop.is_set():
        began = time.monotonic()
        code = _run(program, stop)
        if stop.is_set():
            return
        if time.monotonic() - began >= _CALM_SECONDS:
            pause = shortest_pause
        log.error("%s ended with exit code %s; it is started again in %g s", program.name, code, pause)
        stop.wait(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _run(program: Program, stop: threading.Event) -> int | None:
    """Run a program to its end, or to the stop of all; returns its exit code, None where it could not be started."""
    try:
        # a session of its own: Ctrl-C reaches this process, which then stops them in order
        process = subprocess.Popen(program.command, env=dict(program.environment), start_new_session=True)
    except OSError as error:
        log.error("%s cannot be started: %s", program.name, error.strerror)
        return None
    log.info("%s started, process %d", program.name, process.pid)
    while process.poll() is None and not stop.wait(0.1):
        pass
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("%s does not stop, and is killed", program.name)
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
