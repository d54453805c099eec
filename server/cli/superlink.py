"""`giva superlink`: how this machine reaches SuperLinks."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from giva_core.errors import ConfigError
from giva_core.report import Report, Table

if TYPE_CHECKING:
    from server.connections import Connection

_SOON_DAYS = 30


@click.group()
def superlink() -> None:
    """Add, list and check connections to SuperLinks.

    They stand in Flower's own file, $FLWR_HOME/config.toml (~/.flwr/config.toml).
    """


@superlink.command("add")
@click.argument("name")
@click.argument("address", metavar="HOST:PORT")
@click.option(
    "--root-certificates",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Certificate of the authority that signed the SuperLink's.  [default: the system's authorities]",
)
@click.option("--insecure", is_flag=True, help="Speak without TLS: whoever is on the way reads and changes everything.")
def add_superlink(name: str, address: str, root_certificates: Path | None, insecure: bool) -> Report:
    """Add a connection and make it the default."""
    from server.connections import Connection, SuperLinkError, add_connection, diagnose

    if insecure and root_certificates:
        raise ConfigError(
            "--insecure and --root-certificates exclude each other", remedy="leave --insecure out to use TLS"
        )
    if root_certificates and not root_certificates.is_file():
        raise ConfigError(f"there is no file {root_certificates}", expected="the authority's ca.crt")
    certificates = str(root_certificates.resolve()) if root_certificates else ""
    connection = Connection(name, address, certificates, insecure)
    file = add_connection(connection)
    notes = [f"{name} is in {file} and is the default."]
    if insecure:
        click.echo("Warning: without TLS anyone on the way reads and changes vectors, keys and code.", err=True)
    try:
        ends = diagnose(connection)
        notes.append("It can be reached." + (f" {_validity(ends)}" if ends else ""))
        trouble = ""
    except SuperLinkError as error:
        ends, trouble = None, str(error)
        notes.append(f"It cannot be used now: {error}")
    data = {"file": file, **_data(connection), "default": True, "trouble": trouble, "certificate_ends": _iso(ends)}
    return Report("superlink-add", data, notes=tuple(notes))


@superlink.command("list")
def list_superlinks() -> Report:
    """List the connections."""
    from server.connections import config_file, connections

    found, default = connections()
    rows = tuple(
        (name, item.address, "no" if item.insecure else "yes", item.root_certificates, name == default)
        for name, item in sorted(found.items())
    )
    data = {
        "file": config_file(),
        "superlinks": [{**_data(item), "default": name == default} for name, item in sorted(found.items())],
    }
    notes = () if rows else ("There are none yet; see `giva superlink add --help`.",)
    columns = ("name", "address", "TLS", "root certificates", "default")
    return Report("superlink-list", data, (Table("", columns, rows),) if rows else (), notes)


@superlink.command("check")
@click.argument("name", required=False)
def check_superlink(name: str | None) -> Report:
    """Reach a SuperLink and check its certificate.

    The exit code is 1 if it cannot be reached or trusted, and 3 if its certificate ends within 30 days.
    """
    from server.connections import diagnose, find_connection

    connection = find_connection(name)
    ends = diagnose(connection)
    days = (ends - datetime.now(UTC)).days if ends else None
    soon = days is not None and days < _SOON_DAYS
    notes = [f"SuperLink {connection.name} ({connection.address}) can be reached."]
    notes.append(_validity(ends) if ends else "It speaks without TLS: anyone on the way reads and changes everything.")
    if soon:
        notes.append("Renew it and restart the SuperLink; sites need nothing new as long as the authority is the same.")
    data = {**_data(connection), "certificate_ends": _iso(ends), "days_left": days}
    return Report("superlink-check", data, notes=tuple(notes), exit_code=3 if soon else 0)


def _data(connection: Connection) -> dict[str, object]:
    return {
        "name": connection.name,
        "address": connection.address,
        "root_certificates": connection.root_certificates or None,
        "insecure": connection.insecure,
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _validity(ends: datetime) -> str:
    return f"Its certificate is trusted and valid until {ends:%Y-%m-%d %H:%M} UTC."
