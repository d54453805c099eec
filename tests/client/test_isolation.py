"""Leaving the network, tried by processes that then end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from client import isolation

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces are Linux's")

_LEAVE = """
import ctypes, os, socket, sys, tempfile
from client.isolation import IsolationError, interfaces, leave_network
{before}
try:
    print(leave_network())
except IsolationError as error:
    sys.exit(str(error))
print(interfaces())
with tempfile.NamedTemporaryFile() as file:
    print(os.getuid(), os.stat(file.name).st_uid)
try:
    socket.create_connection(("127.0.0.1", {port}), 5)
except OSError as error:
    print(error.errno)
"""


def leave(before: str = "", port: int = 1) -> subprocess.CompletedProcess[str]:
    code = _LEAVE.format(before=before, port=port)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_after_leaving_there_is_nobody_to_reach_and_files_can_be_written() -> None:
    done = leave()
    if "Operation not permitted" in done.stderr:
        pytest.skip("this machine allows no new namespaces")
    how, left, users, number = done.stdout.splitlines()
    assert how in ("own network namespace", "own user and network namespace", "no interface but the loopback")
    assert left == "[]" and users == f"{os.getuid()} {os.getuid()}" and int(number) > 0


def test_a_user_without_rights_leaves_through_a_namespace_of_its_own() -> None:
    if not isolation.interfaces():
        pytest.skip("there is no network to leave")
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    # a process that changed its user may not open its own /proc files, other than one that was started as that user
    done = leave("os.setgroups([]); os.setgid(65534); os.setuid(65534); ctypes.CDLL(None).prctl(4, 1)")
    if "not permitted" in done.stderr:
        pytest.skip("this machine allows no new namespaces")
    assert done.stdout.splitlines()[:3] == ["own user and network namespace", "[]", "65534 65534"], done.stderr


def test_with_threads_it_is_too_late() -> None:
    done = leave("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()")
    assert done.returncode == 1 and "has threads already" in done.stderr


def test_a_system_that_does_not_let_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "interfaces", lambda: ["eth0"])
    monkeypatch.setattr(isolation.os, "listdir", lambda path: ["1"])
    monkeypatch.setattr(isolation, "_unshare", lambda flags: 1)
    with pytest.raises(isolation.IsolationError, match=r"Operation not permitted.*worker.network = \"host\""):
        isolation.leave_network()
    monkeypatch.setattr(isolation, "_unshare", lambda flags: 0)
    monkeypatch.setattr(isolation.os, "geteuid", lambda: 0)
    with pytest.raises(isolation.IsolationError, match="eth0 are still there"):
        isolation.leave_network()


def test_a_container_without_a_network_needs_no_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "interfaces", list)
    monkeypatch.setattr(isolation.os, "listdir", lambda path: ["1"])
    assert isolation.leave_network() == "no interface but the loopback"


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.sys, "platform", "darwin")
    with pytest.raises(isolation.IsolationError, match="darwin has no network namespaces"):
        isolation.leave_network()
