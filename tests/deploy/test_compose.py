"""The whole federation in containers: a run, what its containers can and cannot do, a dead site, a dead SuperLink.

The tests share one stack and go through it in this order; each leaves three sites and a SuperLink at work. `-s` shows
times, sizes and memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from docker_engine import IMAGES, PROJECT, Engine

from client.archives import obtain
from client.prepare import MEDICAL, MODEL

pytestmark = pytest.mark.deploy

SITES = ("site-1", "site-2", "site-3")
RECIPE = "/opt/fedgiva/recipes/medical.toml"
#: The demo, shortened: everything happens, nothing takes long.
SHORT = {"rounds.head-rounds": 1, "rounds.num-rounds": 3, "rounds.min-sites": 3, "train.max-local-steps": 6}
#: A demo's run ends within minutes; a machine may be slow, but not for ever.
RUN_SECONDS = 1200.0

_HASH = """
import hashlib, sys
from giva_core.checkpoint import load_adapter
adapter = load_adapter(sys.argv[1])
found = hashlib.sha256()
for name, array in sorted(adapter.arrays.items()):
    found.update(name.encode() + str(array.dtype).encode() + str(array.shape).encode() + array.tobytes())
print(adapter.metadata.bases_digest, found.hexdigest())
"""

#: The most memory that a container has used, its files' in memory among it, in either version of cgroups.
_PEAK = """
import pathlib
for name in ("memory.peak", "memory/memory.max_usage_in_bytes", "memory.current"):
    if (path := pathlib.Path("/sys/fs/cgroup", name)).exists():
        print(path.read_text())
        break
"""


def settings(values: Mapping[str, object]) -> list[str]:
    return [text for key, value in values.items() for text in ("--set", f"{key}={value}")]


def note(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


class Stack:
    """The containers of docker-compose.yml."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.compose = engine, engine.compose

    def giva(self, *command: str) -> dict[str, Any]:
        """What an operator's command answers, as its JSON data."""
        done = self.compose("exec", "-T", "server", "giva", *command, "--json", check=False)
        lines = done.stdout.splitlines()
        assert lines, done.stderr[-2000:]
        answer = json.loads(lines[-1])
        assert answer["kind"] != "error", answer["data"]["message"]
        data: dict[str, Any] = answer["data"]
        return data

    def inspect(self, service: str) -> dict[str, Any]:
        name = self.compose("ps", "--all", "--quiet", service).stdout.strip()
        found: dict[str, Any] = json.loads(self.engine.run("docker", "inspect", name).stdout)[0]
        return found

    def python(self, service: str, code: str, *arguments: str) -> str:
        """What Python code prints in a service's container."""
        return self.compose("exec", "-T", service, "python", "-c", code, *arguments).stdout

    def wait(self, what: str, is_so: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
        """Ask until it is so."""
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end:
                said = self.compose("logs", "--tail", "15").stdout
                pytest.fail(f"not within {seconds:.0f} s: {what}\n{said}", pytrace=False)
            time.sleep(1)

    def start(self, values: Mapping[str, object]) -> str:
        """Start a run; returns its id when its store has it."""
        known = {run["run_id"] for run in self.giva("run", "list")["runs"]}
        self.giva("run", "start", RECIPE, "--superlink", "demo", *settings(values))
        new: set[str] = set()

        def is_there() -> bool:
            new.update({run["run_id"] for run in self.giva("run", "list")["runs"]} - known)
            return bool(new)

        self.wait("the run is in the store", is_there, 300)
        return new.pop()

    def status(self, run: str) -> str:
        return str(self.giva("run", "show", run)["status"])

    def rounds(self, run: str, phase: str) -> list[dict[str, Any]]:
        return [item for item in self.giva("round", "list", run)["rounds"] if item["phase"] == phase]

    def adapter(self, run: str) -> str:
        """Digests of a run's bases and of the bytes of everything it trained."""
        folder = self.giva("run", "show", run)["adapter"]
        return self.python("server", _HASH, folder).strip()


@pytest.fixture(scope="module")
def stack(images: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack, just started; there may be no package index where it runs, so the demo's archives are given to it."""
    archives = tmp_path_factory.mktemp("archives")
    for archive in (MODEL, MEDICAL):
        obtain(archive, archives, None, note)
    archives.chmod(0o755)
    images.environment["GIVA_ARCHIVES"] = str(archives)
    stack = Stack(images)
    stack.compose("down", "--volumes", "--timeout", "1")
    began = time.monotonic()
    stack.compose("up", "--detach", "--no-build")
    note(f"docker compose up: {time.monotonic() - began:.0f} s")
    yield stack
    stack.compose("down", "--volumes", "--timeout", "1")


def test_demo_runs_to_its_end(stack: Stack) -> None:
    began = time.monotonic()
    stack.wait("the demo's run has ended", lambda: stack.inspect("run")["State"]["Status"] == "exited")
    note(f"the demo's run: {time.monotonic() - began:.0f} s")
    assert stack.inspect("run")["State"]["ExitCode"] == 0, stack.compose("logs", "run").stdout[-3000:]
    run = stack.giva("run", "show", "last")
    note("\n" + stack.compose("exec", "-T", "server", "giva", "round", "list").stdout)
    assert (run["status"], run["engine"]) == ("completed", "flower")
    assert run["metrics"]["accuracy"] > 0.5  # of 18 classes; the largest has a fifth of the questions
    assert [item["phase"] for item in run["phases"]] == ["hello", "head", "calibrate", "bases", "train"]


def test_every_site_built_the_same_bases(stack: Stack) -> None:
    (built,) = stack.rounds("last", "bases")
    round_ = stack.giva("round", "show", "last", "1", "--phase", "bases")
    assert {site["site"]: site["status"] for site in round_["sites"]} == dict.fromkeys(SITES, "ok")
    assert built["round"] == 1
    digest = stack.giva("adapter", "show", "last")["bases_digest"]
    kept = {site: stack.compose("exec", "-T", f"{site}-worker", "find", "/var/lib/giva").stdout for site in SITES}
    assert all(digest[:16] in names for names in kept.values())


@pytest.mark.parametrize("service", ["superlink", "gate", "server", "site-1-messenger", "site-1-worker"])
def test_container_has_no_powers(stack: Stack, service: str) -> None:
    found = stack.inspect(service)
    host = found["HostConfig"]
    assert found["Config"]["User"] == "10001:10001"
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["Memory"] > 0 and host["PidsLimit"] > 0
    assert not host["Privileged"] and not host["PortBindings"]
    assert found["State"]["Health"]["Status"] == "healthy"
    assert "CapEff:\t0000000000000000" in stack.python(service, "print(open('/proc/self/status').read())")


@pytest.mark.parametrize("site", SITES)
def test_worker_has_no_network(stack: Stack, site: str) -> None:
    assert stack.inspect(f"{site}-worker")["HostConfig"]["NetworkMode"] == "none"
    code = """
import os, re
print([line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]])
print([line for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6") if os.path.exists("/proc/net/" + kind)
       for line in open("/proc/net/" + kind).readlines()[1:]])
print(sorted({line.split()[-1] for line in open("/proc/net/unix").readlines()[1:] if "/" in line}))
"""
    interfaces, internet, unix = stack.python(f"{site}-worker", code).splitlines()
    assert interfaces == "['lo']"
    assert internet == "[]"
    assert unix == "['/run/giva/worker.sock']"


def test_messenger_sees_the_gate_alone(stack: Stack) -> None:
    networks = stack.inspect("site-1-messenger")["NetworkSettings"]["Networks"]
    (name,) = networks
    network = json.loads(stack.engine.run("docker", "network", "inspect", name).stdout)[0]
    assert network["Internal"]
    assert sorted(item["Name"].split("-", 2)[-1] for item in network["Containers"].values()) == [
        "gate-1",
        "site-1-messenger-1",
    ]
    code = """
import socket
for host, port in (("gate", 8443), ("superlink", 8000), ("server", 9098), ("192.0.2.1", 443)):
    try:
        socket.create_connection((host, port), 3).close()
        print(host)
    except OSError:
        pass
"""
    assert stack.python("site-1-messenger", code).split() == ["gate"]


def test_messenger_may_not_speak_to_the_control_api(stack: Stack) -> None:
    code = """
import ssl, urllib.error, urllib.request
context = ssl.create_default_context(cafile="/etc/giva/ca.crt")
for path in ("control/list-nodes", "control/register-node", "runtime/acquire-task", "fleet/pull-messages"):
    try:
        urllib.request.urlopen(f"https://gate:8443/v1/{path}", data=b"", context=context, timeout=10)
    except urllib.error.HTTPError as error:
        print(error.code, end=" ")
"""
    control, register, runtime, fleet = stack.python("site-1-messenger", code).split()
    assert control == register == runtime == "403"
    assert fleet != "403"


def test_messenger_has_neither_data_nor_torch(stack: Stack) -> None:
    mounts = {item["Destination"]: item for item in stack.inspect("site-1-messenger")["Mounts"]}
    assert sorted(mounts) == ["/etc/giva", "/run/giva"]
    assert not any(item["RW"] for item in mounts.values())
    code = """
import importlib.util, os
print([name for name in ("torch", "transformers", "giva_core", "client") if importlib.util.find_spec(name)])
print(os.listdir("/srv/giva"))
"""
    assert stack.python("site-1-messenger", code).splitlines() == ["[]", "[]"]
    worker = {item["Destination"]: item["RW"] for item in stack.inspect("site-1-worker")["Mounts"]}
    assert worker == {"/srv/giva": False, "/run/giva": True, "/var/lib/giva": True}


def test_sites_share_nothing(stack: Stack) -> None:
    volumes: dict[str, set[str]] = {
        site: {
            item["Name"]
            for service in (f"{site}-messenger", f"{site}-worker")
            for item in stack.inspect(service)["Mounts"]
            if item["Type"] == "volume"
        }
        for site in SITES
    }
    assert all(len(names) == 4 for names in volumes.values())
    assert len(set.union(*volumes.values())) == 12


def test_report_sizes_and_memory(stack: Stack) -> None:
    base = int(stack.engine.run("docker", "inspect", "--format={{.Size}}", "python:3.11-slim-bookworm").stdout)
    for image in IMAGES:
        size = int(stack.engine.run("docker", "inspect", "--format={{.Size}}", f"fedgiva/{image}:0.1.0").stdout)
        note(f"image {image:10} {(size - base) / 1e6:6.0f} MB on top of a base of {base / 1e6:.0f} MB")
        assert size > base
    parts = [f"{site}-{part}" for site in SITES for part in ("messenger", "worker")]
    for service in ("superlink", "gate", "server", *parts):
        peak, limit = int(stack.python(service, _PEAK)), stack.inspect(service)["HostConfig"]["Memory"]
        note(f"memory {service:17} {peak / 2**20:6.0f} MiB at most, of {limit / 2**20:.0f}")
        assert peak < limit


def simulated(stack: Stack, values: Mapping[str, object]) -> str:
    """Digests of the same run in one process, with all sites' data, as only this test sees them together."""
    data = "/var/lib/giva/data/medical-dirichlet-3sites-a0.5-n1500-s0/sites"
    options = ["--rm", "--network=none", "--user=0:0", f"--volume={PROJECT}_demo:/var/lib/giva"]
    command = ["simulate", RECIPE, *settings({**values, "data.folder": data}), "--json"]
    image = "fedgiva/worker:0.1.0"
    done = stack.engine.run("docker", "run", *options, "--entrypoint=giva", image, *command, timeout=RUN_SECONDS)
    folder = json.loads(done.stdout.splitlines()[-1])["data"]["adapter"]
    found = stack.engine.run("docker", "run", *options, "--entrypoint=python", image, "-c", _HASH, folder)
    return found.stdout.strip()


def test_simulation_gives_the_same_bytes(stack: Stack) -> None:
    assert simulated(stack, {"rounds.min-sites": 3}) == stack.adapter("last")


def test_run_ends_without_a_site_that_dies(stack: Stack) -> None:
    run = stack.start({**SHORT, "rounds.min-sites": 2, "rounds.deadline-seconds": 60})
    stack.wait("the first round has been counted", lambda: bool(stack.rounds(run, "train")))
    stack.compose("kill", "--signal", "KILL", "site-3-messenger", "site-3-worker")
    stack.wait("the run has ended", lambda: stack.status(run) != "running")
    assert stack.status(run) == "completed"
    rounds = stack.rounds(run, "train")
    assert [item["round"] for item in rounds] == [1, 2, 3]
    last = {site["site"]: site["status"] for site in stack.giva("round", "show", run, "3")["sites"]}
    assert last["site-1"] == last["site-2"] == "ok" != last.get("site-3")  # it was missed, or not asked any more
    assert stack.giva("adapter", "verify", run)["ok"]


def test_site_comes_back(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-build", "--no-recreate", "--no-deps", "site-3-worker", "site-3-messenger")

    def is_online() -> bool:
        sites = stack.giva("site", "list", "--superlink", "demo")["sites"]
        return {site["site"]: site["status"] for site in sites} == dict.fromkeys(SITES, "online")

    stack.wait("all three sites are online", is_online, 180)
    assert len(stack.giva("site", "list", "--superlink", "demo")["sites"]) == 3  # it has no second identity


def test_run_is_resumed_after_the_server_was_killed(stack: Stack) -> None:
    """As if the server's machine had lost its power: SuperLink, gate and ServerApp are gone, and stay away."""
    run = stack.start(SHORT)
    stack.wait("the first round has been counted", lambda: bool(stack.rounds(run, "train")))
    stack.compose("kill", "--signal", "KILL", "superlink", "gate", "server")
    assert stack.inspect("superlink")["State"]["ExitCode"] == 137
    stack.compose("up", "--detach", "--no-build", "--no-recreate", "--no-deps", "--wait", "superlink")
    stack.compose("up", "--detach", "--no-build", "--no-recreate", "--no-deps", "gate", "server")
    stack.giva("run", "resume", run, "--superlink", "demo")
    stack.wait("the resumed run has ended", lambda: stack.status(run) in ("completed", "failed"))
    assert stack.status(run) == "completed"
    assert [item["round"] for item in stack.rounds(run, "train")] == [1, 2, 3]
    assert stack.adapter(run) == simulated(stack, SHORT)  # as if nothing had happened
