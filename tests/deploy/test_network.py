"""A whole run in a network without an uplink: nothing speaks to anything but the SuperLink."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from live_federation import ROOT, need, run_file

from giva_core.config import RunConfig

pytestmark = pytest.mark.deploy

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
NAMESPACE = ("unshare", "-n") if os.geteuid() == 0 else ("unshare", "-r", "-n")


def test_a_whole_run_makes_no_other_connection(toy_config: RunConfig, toy_model: Path, toy_folder: Path) -> None:
    need("unshare", "ip")
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.fail(
            f"this test needs a network namespace, which this machine does not permit: {tried.stderr.strip()}; "
            "run it as root, or allow unprivileged user namespaces",
            pytrace=False,
        )
    folder = Path(tempfile.mkdtemp(prefix="giva-"))
    try:
        for site, source in zip(("hospital-a", "hospital-b"), sorted(toy_folder.iterdir()), strict=False):
            shutil.copytree(source, folder / "data" / site)
        config = toy_config.replace(
            data__folder="", rounds__min_sites=2, rounds__num_rounds=1, rounds__join_seconds=60.0
        )
        script = Path(__file__).with_name("closed_network.py")
        arguments = [folder, toy_model, folder / "data", run_file(folder, config)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*NAMESPACE, sys.executable, script, *arguments], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-5000:]
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    finally:
        shutil.rmtree(folder)
    assert (found["status"], found["rounds"]) == ("completed", 1)
    assert found["packets"] == 0, "something wanted to leave this machine"
    assert found["datagrams"] == 0, "something asked for a name"
    assert set(found["addresses"]) <= LOOPBACK and found["connections"] > 5
    assert found["strangers"] == [], "two processes spoke to each other that should not know of one another"
    assert found["workers"] >= 2 and found["workers_in_this_network"] == 0
    assert (found["packets_after_one_more"], found["datagrams_after_one_more"]) == (1, 1)  # the test can see
