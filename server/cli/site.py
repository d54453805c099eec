"""`giva site`, the operator's half: whose key may join. The site's own half is in `client/cli/site.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from giva_core.errors import ConfigError, StoreError
from giva_core.report import Report, Table

from .options import superlink_option

if TYPE_CHECKING:
    from server.approved import ApprovedSite
    from server.flower import Node, SuperLink

_REVOKED = "unregistered"  # Flower's word


@click.group()
def site() -> None:
    """Run a site, and say which sites may join.

    At a hospital: check, start, status, worker. At the server: approve, list, revoke.
    """


@site.command("approve")
@click.argument("key", metavar="KEY.pub", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--name", required=True, help="What the site is called, as in its site.toml.")
@superlink_option
def approve(link: SuperLink, key: Path, name: str) -> Report:
    """Let the owner of a key join.

    Compare the fingerprint with the site's engineer, over another way than the one the key came by.
    """
    from giva_core.protocol import SITE_NAME
    from server.approved import ApprovedSites, fingerprint

    if not SITE_NAME.fullmatch(name):
        raise ConfigError(
            "a site cannot have this name", got=repr(name), expected="letters, digits and . _ - alone, at most 63"
        )
    known = ApprovedSites()
    for node, entry in _joined(link.nodes(), known.by_node()):
        if entry is not None and entry.site == name and node.status != _REVOKED:
            raise StoreError(
                f"site {name} is approved already",
                got=f"node {node.node_id}, key {entry.fingerprint}",
                remedy=f"for a new key, `giva site revoke {name}` first",
            )
    node_id = link.register(key, name)
    print_of_key = fingerprint(key)
    known.add(node_id, name, print_of_key)
    data = {"site": name, "node_id": node_id, "fingerprint": print_of_key, "superlink": link.connection.name}
    notes = (
        f"Site {name} may join SuperLink {link.connection.name} as node {node_id}.",
        f"Its key is {print_of_key}; the site sees the same with `ssh-keygen -lf site.key`.",
    )
    return Report("site-approve", data, notes=notes)


@site.command("list")
@click.option("--all", "everything", is_flag=True, help="Show revoked sites as well.")
@superlink_option
def list_sites(link: SuperLink, everything: bool) -> Report:
    """List the sites that may join, and whether they are there."""
    from server.approved import ApprovedSites

    pairs = _joined(link.nodes(), ApprovedSites().by_node())
    shown = [(node, entry) for node, entry in pairs if everything or node.status != _REVOKED]
    entries = [
        {
            "site": entry.site if entry else None,
            "node_id": node.node_id,
            "status": _status(node),
            "fingerprint": entry.fingerprint if entry else None,
            "approved": node.registered,
            "online": node.online or None,
            "offline": node.offline or None,
        }
        for node, entry in shown
    ]
    hidden = len(pairs) - len(shown)
    notes = [f"{hidden} revoked are not shown; see --all."] if hidden else []
    if any(entry is None for _, entry in shown):
        notes.append("A site without a name was approved on another machine, or without `giva site approve`.")
    if not entries:
        notes.append("No site may join yet; see `giva site approve --help`.")
    columns = ("site", "node", "status", "key", "approved", "last came", "last left")
    rows = tuple(tuple(entry.values()) for entry in entries)
    data = {"superlink": link.connection.name, "sites": entries}
    return Report("site-list", data, (Table("", columns, rows),) if rows else (), tuple(notes))


@site.command("revoke")
@click.argument("reference", metavar="NAME|NODE_ID")
@superlink_option
def revoke(link: SuperLink, reference: str) -> Report:
    """Throw a site out for good; its key is never taken again."""
    from server.approved import ApprovedSites

    pairs = [pair for pair in _joined(link.nodes(), ApprovedSites().by_node()) if pair[0].status != _REVOKED]
    found = [(node, entry) for node, entry in pairs if reference in (node.node_id, entry.site if entry else None)]
    if not found:
        known = ", ".join(entry.site if entry else node.node_id for node, entry in pairs) or "none"
        raise StoreError(
            f"no site '{reference}' may join SuperLink {link.connection.name}",
            expected=f"one of: {known}",
            cause="it was revoked before, or approved on another machine and has no name here",
            remedy="see `giva site list --all`",
        )
    node, entry = found[0]
    link.unregister(node.node_id)
    name = entry.site if entry else None
    data = {"site": name, "node_id": node.node_id, "superlink": link.connection.name}
    note = (
        f"Site {name or node.node_id} is thrown out: its node ends within seconds, and its key is never taken again. "
        "To let it back in, approve a new key."
    )
    return Report("site-revoke", data, notes=(note,))


def _status(node: Node) -> str:
    return {"registered": "never came", _REVOKED: "revoked"}.get(node.status, node.status)


def _joined(nodes: list[Node], known: dict[str, ApprovedSite]) -> list[tuple[Node, ApprovedSite | None]]:
    return [(node, known.get(node.node_id)) for node in nodes]
