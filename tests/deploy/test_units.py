"""The systemd units: systemd accepts them, and each is kept in as tightly as docs/deploy.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from live_federation import BIN, QUIET, ROOT, need

pytestmark = pytest.mark.deploy

FOLDER = ROOT / "deploy" / "systemd"
UNITS = sorted(path.stem for path in FOLDER.glob("*.service"))
FLOWER_S = {
    "giva-superlink": "flower-superlink",
    "giva-server": "flower-superexec",
    "giva-messenger": "flower-supernode",
}


def service(unit: str) -> dict[str, str]:
    """The section [Service]; values of a key that comes several times are joined by a space."""
    found: dict[str, str] = {}
    text = (FOLDER / f"{unit}.service").read_text().replace("\\\n", " ")
    for line in text.partition("[Service]")[2].partition("[Install]")[0].splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[key] = " ".join(f"{found.get(key, '')} {value}".split())
    return found


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """The units, with programs that are on this machine."""
    need("systemd-analyze")
    files = []
    for unit in UNITS:
        text = (FOLDER / f"{unit}.service").read_text()
        text = re.sub(r"/opt/giva(-messenger)?/bin/", f"{BIN}/", text).replace("EnvironmentFile=", "EnvironmentFile=-")
        files.append(tmp_path / f"{unit}.service")
        files[-1].write_text(text)
    return files


def test_systemd_accepts_the_units(installed: list[Path]) -> None:
    (BIN / "giva").exists() or pytest.fail("the command giva is not installed beside python", pytrace=False)
    done = subprocess.run(["systemd-analyze", "verify", *installed], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "giva-" in line]
    assert done.returncode == 0 and complaints == []


def test_systemd_rates_every_unit_as_well_kept_in(installed: list[Path]) -> None:
    for file in installed:
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", file]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_worker_has_no_network_and_the_messenger_no_data() -> None:
    worker, messenger = service("giva-worker"), service("giva-messenger")
    assert worker["PrivateNetwork"] == "yes" and worker["RestrictAddressFamilies"] == "AF_UNIX"
    assert worker["IPAddressDeny"] == "any" and "IPAddressAllow" not in worker
    assert {"-/srv", "-/var/lib/giva-worker"} <= set(messenger["InaccessiblePaths"].split())
    assert messenger["PrivateDevices"] == "yes"
    assert worker["User"] != messenger["User"] and worker["Group"] == messenger["Group"]
    assert "site.key" not in worker.get("LoadCredential", "") and "site.toml" not in messenger["ExecStart"]


def test_superlink_and_server_speak_to_this_machine_alone() -> None:
    for unit in ("giva-superlink", "giva-server"):
        found = service(unit)
        assert (found["IPAddressDeny"], found["IPAddressAllow"]) == ("any", "localhost")
    assert "--host 127.0.0.1" in service("giva-superlink")["ExecStart"]
    assert "--enable-supernode-auth" in service("giva-superlink")["ExecStart"]


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_is_kept_in(unit: str) -> None:
    found = service(unit)
    for key in ("NoNewPrivileges", "RestrictNamespaces", "PrivateTmp", "ProtectHome", "ProtectKernelModules"):
        assert found[key] == "yes", key
    assert found["ProtectSystem"] == "strict" and found["CapabilityBoundingSet"] == ""
    assert found["SystemCallFilter"].startswith("@system-service ~@privileged")
    assert 64 <= int(found["TasksMax"]) <= 1024


def test_strangers_cannot_fill_the_memory_through_the_gate() -> None:
    assert service("giva-gate")["MemoryMax"] == "512M"


@pytest.mark.parametrize(("unit", "command"), FLOWER_S.items())
def test_flower_knows_every_option_and_reports_nothing_home(unit: str, command: str) -> None:
    found = service(unit)
    environment = dict(part.split("=", 1) for part in found["Environment"].split())
    assert {name: environment.get(name) for name in QUIET} == QUIET
    arguments = found["ExecStart"].partition(command)[2]
    shown = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"(?<!\S)--[a-z-]+", arguments))
    assert options and {option for option in options if option not in shown} == set()


def test_the_programs_of_this_project_are_there() -> None:
    for unit in ("giva-gate", "giva-messenger"):
        [script] = re.findall(r"/opt/giva/src/(\S+\.py)", service(unit)["ExecStart"])
        done = subprocess.run([sys.executable, "-m", "py_compile", ROOT / script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_user_is_made() -> None:
    made = "".join(path.read_text() for path in FOLDER.glob("*.sysusers"))
    known = set(re.findall(r"^[ug] +(\S+)", made, re.MULTILINE))
    for unit in UNITS:
        found = service(unit)
        wanted = {found[key] for key in ("User", "Group") if key in found}
        assert wanted <= known and (wanted or found.get("DynamicUser") == "yes"), unit
