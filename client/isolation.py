"""Leaving the network: the worker's process, and every process it starts, keeps no way to any other machine.

Linux only, by `unshare(2)`: as root into a network namespace of its own, else into a user namespace that has one. Both
hold for the calling thread and what it starts, so this has to come before any thread is started: before numpy, torch
and gRPC are imported. The new namespace has a loopback interface that is down, and nothing else. Unix sockets that have
a path stay reachable.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from giva_core.errors import GivaError

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


class IsolationError(GivaError):
    """This process cannot leave the network."""

    kind = "isolation"


def interfaces() -> list[str]:
    """The network interfaces that this process sees, without the loopback."""
    lines = Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines()[2:]
    return [name for name in (line.partition(":")[0].strip() for line in lines) if name != "lo"]


def leave_network() -> str:
    """Cut this process off the network for good; returns how, in words.

    Raises:
        IsolationError: The system does not let it.
    """
    if not sys.platform.startswith("linux"):
        raise _error(f"{sys.platform} has no network namespaces")
    if len(os.listdir("/proc/self/task")) > 1:
        raise _error("this process has threads already, and they would stay where they are")
    if not interfaces():
        return "no interface but the loopback"
    if os.geteuid() == 0 and _unshare(_CLONE_NEWNET) == 0:
        how = "own network namespace"
    else:
        user, group = os.geteuid(), os.getegid()
        if failure := _unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
            raise _error(os.strerror(failure))
        _keep_identity(user, group)
        how = "own user and network namespace"
    if left := interfaces():
        raise _error(f"the interfaces {', '.join(left)} are still there")
    return how


def _unshare(flags: int) -> int:
    """0, or the number of the error."""
    library = ctypes.CDLL(None, use_errno=True)
    return 0 if library.unshare(flags) == 0 else ctypes.get_errno()


def _keep_identity(user: int, group: int) -> None:
    """Be the same user inside: files that a user without a name in its namespace writes cannot have an owner."""
    Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="utf-8")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="utf-8")


def _error(got: str) -> IsolationError:
    return IsolationError(
        "the worker cannot leave the network",
        got=got,
        cause="the kernel or a container's seccomp profile does not allow a new namespace, or threads run already",
        remedy="allow unprivileged user namespaces, run the worker in a container without a network, "
        'or set worker.network = "host" in the site file if something else keeps it from the network',
    )
