"""A whole federation in a network that leads nowhere, watched: run by test_network.py inside a namespace of its own.

    unshare -n python closed_network.py FOLDER MODEL DATA CONFIG.toml

There is a loopback, and a default route into a wire whose other end nobody reads: whatever wanted to leave is counted
there. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
from live_federation import LiveFederation, command_of

SITES = ("hospital-a", "hospital-b")
NOWHERE = "192.0.2.1"  # RFC 5737: no machine has it
_LISTEN = "0A"


def make_network() -> None:
    """Bring the loopback up, and lay a wire that swallows the rest."""
    for command in (
        "link set lo up",
        "link add wire type veth peer name end",
        "link set wire arp off",
        "link set end up",
        "addr add 198.51.100.1/24 dev wire",
        "link set wire up",
        "route add default dev wire",
    ):
        if command == "link set end up":
            for name in ("wire", "end"):  # else the kernel itself asks there for routers
                switch = Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
                if switch.exists():
                    switch.write_text("1")
        subprocess.run(["ip", *command.split()], check=True)


def packets_out() -> int:
    """Packets that went into the wire."""
    [line] = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("wire:")]
    return int(line.split()[10])


def datagrams() -> int:
    """UDP packets that were sent to anywhere, as every question for a name is."""
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Udp:")
    )
    return int(values[names.index("OutDatagrams")])


class Watch(threading.Thread):
    """Looks at all TCP connections again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[tuple[str, int, int]] = set()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            for name in ("tcp", "tcp6"):
                file = Path("/proc/net", name)
                for line in file.read_text().splitlines()[1:] if file.exists() else []:
                    _, local, remote, state, *_ = line.split()
                    if state != _LISTEN:
                        (address, port), own = remote.split(":"), local.rpartition(":")[2]
                        self.seen.add((address, int(own, 16), int(port, 16)))


def main(folder: Path, model: Path, data: Path, config: Path) -> dict[str, object]:
    """Run the federation; returns what was seen."""
    make_network()
    watch = Watch()
    watch.start()
    federation = LiveFederation(folder, model, data)
    try:
        federation.make_certificates("--site", SITES[0], "--site", SITES[1])
        federation.start_superlink()
        federation.giva(
            "superlink", "add", "here", federation.address, "--root-certificates", federation.keys / "ca.crt"
        )
        for site in SITES:
            federation.giva("site", "approve", federation.keys / f"{site}.pub", "--name", site)
        federation.start_server()
        whole = federation.start_site(SITES[0])
        worker, messenger = federation.start_site_in_parts(SITES[1])
        federation.wait_for_sites(*SITES)
        run = federation.giva("run", "start", config, "--stream")
        own = os.readlink("/proc/self/ns/net")
        programs = [process for program in (whole, worker) for process in program.all_of_it()]
        workers = [process for process in programs if "worker" in command_of(process)]
        shared = [process.pid for process in workers if os.readlink(f"/proc/{process.pid}/ns/net") == own]
        sites = [process for program in (whole, messenger) for process in program.all_of_it()]
        listening = {
            link.laddr.port
            for process in [*sites, *federation.programs["superlink"].all_of_it()]
            for link in process.net_connections("tcp")
            if link.status == psutil.CONN_LISTEN
        }
    finally:
        federation.stop()
        watch.done.set()
        watch.join()
    found = {
        "status": run["status"],
        "rounds": run["rounds_done"],
        "packets": packets_out(),
        "datagrams": datagrams(),
        "workers": len(workers),
        "workers_in_this_network": len(shared),
        "addresses": sorted({address for address, _, _ in watch.seen}),
        "strangers": sorted(pair[1:] for pair in watch.seen if not listening & set(pair[1:])),
        "connections": len(watch.seen),
    }
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # it would have been seen
        probe.sendto(b"x", (NOWHERE, 53))
    return {**found, "packets_after_one_more": packets_out(), "datagrams_after_one_more": datagrams()}


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
