"""`giva site approve|list|revoke` and `giva superlink`: names beside Flower's numbers, and no key approved twice."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from giva_core.errors import StoreError
from server.approved import ApprovedSites, fingerprint
from server.cli.main import cli
from server.connections import Connection, SuperLinkError, connections
from server.flower import Node, SuperLink

# of a fixed key, as ssh-keygen -lf prints it
KEY = (
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBHAqHNxeUo3QpDvl9TEHIFw28kfaYOAGZ4Cz1dMOP5"
    "p0UKzmNeCs6uVjRPBHEIt0Z6GT5XFk6GYt+f4o4ZjgYRTTS1vJYZyTjQkQGTn5ZMi5tZ4RbcTLQuIoVtZs2n5EFQ== hospital-a\n"
)


class FakeLink:
    """A SuperLink that keeps its nodes in a list."""

    connection = Connection("here", "127.0.0.1:1")

    def __init__(self) -> None:
        self.entries: list[Node] = []

    def register(self, public_key: Path, site: str) -> str:
        node_id = str(6_000_000_000_000_000_000 + len(self.entries))
        self.entries.append(Node(node_id, "registered", "2026-11-22 13:09:28Z", "", ""))
        return node_id

    def nodes(self) -> list[Node]:
        return self.entries

    def unregister(self, node_id: str) -> None:
        self.set_status(node_id, "unregistered")

    def set_status(self, node_id: str, status: str) -> None:
        self.entries = [replace(node, status=status) if node.node_id == node_id else node for node in self.entries]


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeLink:
    made = FakeLink()
    monkeypatch.setattr(SuperLink, "find", lambda name: made)
    monkeypatch.setenv("GIVA_HOME", str(tmp_path / "giva"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    (tmp_path / "a.pub").write_text(KEY)
    return made


def giva(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def data_of(done: Result, kind: str, exit_code: int = 0) -> dict[str, Any]:
    assert done.exit_code == exit_code, done.stderr
    envelope = json.loads(done.stdout)
    assert envelope["kind"] == kind
    return envelope["data"]


def test_approve_list_and_revoke(link: FakeLink, tmp_path: Path) -> None:
    data = data_of(giva("site", "approve", tmp_path / "a.pub", "--name", "hospital-a", "--json"), "site-approve")
    assert set(data) == {"site", "node_id", "fingerprint", "superlink"}
    assert data["fingerprint"] == fingerprint(tmp_path / "a.pub")
    node_id = data["node_id"]

    [entry] = data_of(giva("site", "list", "--json"), "site-list")["sites"]
    assert set(entry) == {"site", "node_id", "status", "fingerprint", "approved", "online", "offline"}
    assert (entry["site"], entry["node_id"], entry["status"]) == ("hospital-a", node_id, "never came")
    assert "hospital-a" in giva("site", "list").stdout and node_id in giva("site", "list").stdout

    data = data_of(giva("site", "revoke", "hospital-a", "--json"), "site-revoke")
    assert data == {"site": "hospital-a", "node_id": node_id, "superlink": "here"}
    shown = giva("site", "list").stdout
    assert "1 revoked are not shown" in shown and node_id not in shown
    assert "revoked" in giva("site", "list", "--all").stdout


def test_a_name_is_given_once_and_again_after_it_was_revoked(link: FakeLink, tmp_path: Path) -> None:
    approve = ("site", "approve", tmp_path / "a.pub", "--name", "hospital-a")
    assert giva(*approve).exit_code == 0
    done = giva(*approve)
    assert done.exit_code == 1 and "approved already" in done.stderr and "giva site revoke hospital-a" in done.stderr
    assert giva("site", "revoke", "hospital-a").exit_code == 0
    assert giva(*approve).exit_code == 0
    assert [node.status for node in link.entries] == ["unregistered", "registered"]
    assert giva("site", "revoke", "hospital-a").exit_code == 0
    assert [node.status for node in link.entries] == ["unregistered", "unregistered"]


def test_a_name_that_no_site_can_have_is_refused_before_the_key_is_sent(link: FakeLink, tmp_path: Path) -> None:
    done = giva("site", "approve", tmp_path / "a.pub", "--name", "St. Mary")
    assert done.exit_code == 2 and "cannot have this name" in done.stderr and link.entries == []


def test_nodes_approved_elsewhere_have_no_name_and_go_by_their_number(link: FakeLink, tmp_path: Path) -> None:
    node_id = link.register(tmp_path / "a.pub", "hospital-a")
    link.set_status(node_id, "online")
    done = giva("site", "list")
    assert "approved on another machine" in done.stdout and "online" in done.stdout
    assert giva("site", "revoke", node_id).exit_code == 0 and link.entries[0].status == "unregistered"


def test_a_site_that_is_not_there_is_named_with_those_that_are(link: FakeLink, tmp_path: Path) -> None:
    giva("site", "approve", tmp_path / "a.pub", "--name", "hospital-a")
    done = giva("site", "revoke", "hospital-b")
    assert done.exit_code == 1 and "one of: hospital-a" in done.stderr


def test_a_damaged_list_of_sites_says_so(link: FakeLink, tmp_path: Path) -> None:
    file = tmp_path / "giva" / "sites.json"
    file.parent.mkdir()
    file.write_text('{"sites": [{"node_id": "1"}]}')
    with pytest.raises(StoreError, match=r"list of sites .*sites.json cannot be read"):
        ApprovedSites().by_node()
    assert giva("site", "list").exit_code == 1


# -- giva superlink ---------------------------------------------------------------------------------------------------


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> list[datetime | SuperLinkError | None]:
    """What reaching a SuperLink comes to."""
    outcome: list[datetime | SuperLinkError | None] = [None]

    def diagnose(connection: Connection) -> datetime | None:
        if isinstance(outcome[0], SuperLinkError):
            raise outcome[0]
        return outcome[0]

    monkeypatch.setattr("server.connections.diagnose", diagnose)
    return outcome


def test_add_and_list_superlinks(link: FakeLink, probe: list[Any], tmp_path: Path) -> None:
    (tmp_path / "ca.crt").touch()
    probe[0] = datetime(2030, 1, 2, tzinfo=UTC)
    add = ("superlink", "add", "clinic", "superlink.example.org:8443", "--root-certificates", tmp_path / "ca.crt")
    data = data_of(giva(*add, "--json"), "superlink-add")
    assert data["default"] is True and data["certificate_ends"] == "2030-01-02T00:00:00+00:00"
    assert connections()[0]["clinic"].root_certificates == str(tmp_path / "ca.crt")
    [entry] = data_of(giva("superlink", "list", "--json"), "superlink-list")["superlinks"]
    assert set(entry) == {"name", "address", "root_certificates", "insecure", "default"}
    assert "superlink.example.org:8443" in giva("superlink", "list").stdout


def test_an_insecure_connection_is_warned_of(link: FakeLink, probe: list[Any], tmp_path: Path) -> None:
    done = giva("superlink", "add", "lab", "127.0.0.1:8000", "--insecure")
    assert done.exit_code == 0 and done.stderr.startswith("Warning: without TLS anyone on the way")
    (tmp_path / "ca.crt").touch()
    done = giva("superlink", "add", "lab", "h:1", "--insecure", "--root-certificates", tmp_path / "ca.crt")
    assert done.exit_code == 2 and "exclude each other" in done.stderr
    done = giva("superlink", "add", "lab", "h:1", "--root-certificates", tmp_path / "none.crt")
    assert done.exit_code == 2 and "there is no file" in done.stderr


def test_a_superlink_that_is_not_up_yet_is_added_all_the_same(link: FakeLink, probe: list[Any]) -> None:
    probe[0] = SuperLinkError("SuperLink lab cannot be reached", cause="it is not started")
    done = giva("superlink", "add", "lab", "127.0.0.1:8000")
    assert done.exit_code == 0 and "cannot be used now: SuperLink lab cannot be reached" in done.stdout
    assert connections()[1] == "lab"
    assert giva("superlink", "check").exit_code == 1


@pytest.mark.parametrize(("days", "exit_code"), [(31, 0), (29, 3)])
def test_check_tells_in_time_that_a_certificate_ends(
    link: FakeLink, probe: list[Any], days: int, exit_code: int
) -> None:
    giva("superlink", "add", "lab", "127.0.0.1:8000")
    probe[0] = datetime.now(UTC) + timedelta(days=days, hours=1)
    data = data_of(giva("superlink", "check", "--json"), "superlink-check", exit_code)
    assert data["days_left"] == days
    assert ("Renew it" in giva("superlink", "check", "lab").stdout) == bool(exit_code)
