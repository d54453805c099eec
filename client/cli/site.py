"""`giva site`, the site's half: run a worker or a whole site, look at it, check it. The operator's is the server's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from giva_core.config import RunConfig
from giva_core.report import Report, Table

if TYPE_CHECKING:
    from client.wire.worker_pb2 import StatusReply

_SITE_FILE = click.argument("site_file", metavar="SITE.toml", type=click.Path(dir_okay=False, path_type=Path))


@click.group()
def site() -> None:
    """Run a site, and say which sites may join."""


@site.command("worker")
@_SITE_FILE
def worker(site_file: Path) -> Report:
    """Run the process that sees data and model.

    It answers the site's messenger over a Unix socket, and has no network. It runs until SIGTERM.
    """
    # nothing that starts threads may be imported before the worker has left the network
    from client.worker import configure_log, run

    configure_log()
    return Report("site-worker", {}, exit_code=run(site_file))


@site.command("start")
@_SITE_FILE
def start(site_file: Path) -> Report:
    """Run the whole site: the worker, and Flower's SuperNode.

    Both are restarted where they end, and stopped by SIGTERM or Ctrl-C.
    """
    from client.supervise import site_programs, supervise
    from client.worker import configure_log

    configure_log()
    return Report("site-start", {}, exit_code=supervise(site_programs(site_file)))


@site.command("status")
@_SITE_FILE
def status(site_file: Path) -> Report:
    """Show what the site's worker is doing."""
    from client.site_file import SiteFile
    from client.wire.link import Link

    with Link(SiteFile.read(site_file).worker.socket) as link:
        found = link.status()
    data = {spec.name: getattr(found, spec.name) for spec in found.DESCRIPTOR.fields}
    return Report("site-status", data, (Table("", ("", ""), _status_rows(found)),))


@site.command("check")
@_SITE_FILE
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A run's configuration, to check labels, policy and model against.",
)
def check(site_file: Path, config: Path | None) -> Report:
    """Try what a run would need: site file, data, models, bases, network.

    Nothing is sent, and nothing of the data is shown but counts. The exit code is 1 if something is wrong.
    """
    from client.checks import check_site

    found = check_site(site_file, RunConfig.from_toml(config) if config else None)
    rows = tuple((entry.what, "ok" if entry.ok else "wrong", entry.found) for entry in found)
    failed = sum(not entry.ok for entry in found)
    note = f"{failed} of {len(found)} are wrong." if failed else "This site can join."
    data = {"ok": not failed, "checks": [vars(entry) for entry in found]}
    return Report("site-check", data, (Table("", ("what", "state", "found"), rows),), (note,), int(bool(failed)))


def _status_rows(found: StatusReply) -> tuple[tuple[str, object], ...]:
    task = "-"
    if found.busy:
        task = f"{found.kind} of run {found.run}" + (f", round {found.round}" if found.round else "")
    steps = f"{found.step} of {found.steps}" if found.steps else "-"
    return (
        ("state", "busy" if found.busy else "idle"),
        ("task", task),
        ("steps", steps),
        ("seconds", round(found.seconds, 1) if found.busy else None),
        ("waiting", f"{found.waiting} of {found.queue}"),
        ("done", found.done),
        ("refused", found.refused),
        ("killed", found.killed),
        ("model loads", found.model_loads),
        ("memory", f"{found.memory_bytes / 2**20:.0f} MiB"),
        ("up for", f"{found.up_seconds:.0f} s"),
        ("network", found.network),
    )
