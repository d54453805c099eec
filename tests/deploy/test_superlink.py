"""Real processes with TLS and keys: a whole run, killed and resumed; keys unknown and revoked; certificates ended."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_federation import LiveFederation, Program, is_gone, run_file

from giva_core.config import RunConfig

pytestmark = pytest.mark.deploy

SITES = ("hospital-a", "hospital-b")
ROUNDS = 4


@pytest.fixture
def make_federation(toy_model: Path, toy_folder: Path) -> Iterator[Callable[[], LiveFederation]]:
    """Makes federations that are stopped in the end; in short folders, for the sake of Unix sockets."""
    made: list[LiveFederation] = []

    def make() -> LiveFederation:
        folder = Path(tempfile.mkdtemp(prefix="giva-"))
        data = folder / "data"
        for site, source in zip(SITES, sorted(toy_folder.iterdir()), strict=False):
            shutil.copytree(source, data / site)
        made.append(LiveFederation(folder, toy_model, data))
        return made[-1]

    yield make
    for federation in made:
        federation.stop()
        shutil.rmtree(federation.folder)


@pytest.fixture
def federation(make_federation: Callable[[], LiveFederation]) -> LiveFederation:
    """A SuperLink to which the operator is connected."""
    made = make_federation()
    made.make_certificates("--site", SITES[0], "--site", SITES[1])
    made.start_superlink()
    made.giva("superlink", "add", "here", made.address, "--root-certificates", made.keys / "ca.crt")
    return made


@pytest.fixture
def config(toy_config: RunConfig, toy_model: Path) -> RunConfig:
    """The toy's run, for two sites on machines of their own."""
    return toy_config.replace(
        name="toy", data__folder="", rounds__min_sites=2, rounds__num_rounds=ROUNDS, rounds__join_seconds=60.0
    )


def approve(federation: LiveFederation, site: str) -> str:
    data = federation.giva("site", "approve", federation.keys / f"{site}.pub", "--name", site)
    return str(data["node_id"])


def test_a_run_that_is_killed_three_times_ends_as_if_nothing_had_been(
    federation: LiveFederation, config: RunConfig
) -> None:
    for site in SITES:
        approve(federation, site)
    federation.start_server()
    for site in SITES:
        federation.start_site_in_parts(site)
    federation.wait_for_sites(*SITES)
    store = federation.store

    def rounds_done(count: int) -> Callable[[], bool]:
        return lambda: bool(store.runs()) and (store.run("last").rounds_done >= count or store.run("last").reason != "")

    # 1. the ServerApp's process is killed
    federation.giva("run", "start", run_file(federation.folder, config))
    federation.wait_for("round 1", rounds_done(1))
    server_app = federation.server_app()
    assert server_app is not None, store.run("last")
    server_app.kill()
    federation.wait_for("the process is gone", lambda: is_gone(server_app))
    assert store.run("last").status == "running"  # it could not say anything any more

    # 2. the whole server is killed, SuperLink and all
    federation.giva("run", "resume", "last")
    federation.wait_for("round 2", rounds_done(2))
    for name in ("superlink", "server"):
        federation.programs[name].kill()
    federation.start_superlink()
    federation.start_server()

    # 3. the operator stops it
    federation.giva("run", "resume", "last")
    federation.wait_for("round 3", rounds_done(3))
    assert federation.giva("run", "stop", "last")["was_running"] is True
    assert store.run("last").status == "stopped"

    data = federation.giva("run", "resume", "last", "--stream")
    assert data["status"] == "completed" and data["rounds_done"] == ROUNDS and data["troubles"] == []
    assert len(store.runs()) == 1

    federation.environment |= {"GIVA_SIMULATION": "1", "GIVA_HOME": str(federation.folder / "simulated")}
    simulated = federation.giva(
        "simulate", run_file(federation.folder, config), "--set", f"data.folder={federation.data}"
    )
    for digest in ("bases_digest", "arrays_digest"):
        assert data["facts"][digest] == simulated["facts"][digest]
    for site in SITES:  # the model was loaded once, whatever became of the server
        status = federation.giva("site", "status", federation.folder / site / "site.toml")
        assert status["model_loads"] == 1 and status["network"] != "host"


def ends(program: Program) -> Callable[[], bool]:
    return lambda: program.process.poll() is not None


def test_unknown_and_revoked_keys_are_refused(federation: LiveFederation) -> None:
    site = SITES[0]
    unknown = federation.start_supernode(site)
    federation.wait_for("an unknown key is refused", ends(unknown))
    assert unknown.process.returncode == 1 and "Failed to activate SuperNode" in unknown.log

    approve(federation, site)
    known = federation.start_supernode(site)
    federation.wait_for_sites(site)
    federation.giva("site", "revoke", site)
    federation.wait_for("a revoked key is thrown out", ends(known))
    assert federation.giva("site", "list")["sites"] == []

    again = federation.start_supernode(site)
    federation.wait_for("a revoked key is refused", ends(again))
    assert again.process.returncode == 1
    told = federation.giva("site", "approve", federation.keys / f"{site}.pub", "--name", site, exit_code=1)
    assert "a key that was revoked is never taken again" in told["message"]

    (federation.keys / f"{site}.key").unlink()
    (federation.keys / f"{site}.pub").unlink()
    federation.make_certificates("--site", site)
    approve(federation, site)
    federation.start_supernode(site)
    federation.wait_for_sites(site)


def test_an_expired_certificate_is_said_and_renewed_without_the_sites(
    make_federation: Callable[[], LiveFederation],
) -> None:
    federation = make_federation()
    site = SITES[0]
    federation.make_certificates("--site", site, "--days", 0)
    federation.start_superlink()
    added = federation.giva(
        "superlink", "add", "here", federation.address, "--root-certificates", federation.keys / "ca.crt"
    )
    assert "has expired" in added["trouble"]
    for command in (("superlink", "check"), ("site", "list")):
        told = federation.giva(*command, exit_code=1)["message"]
        assert re.search(r"certificate that has expired.*renew the SuperLink's certificate and restart it", told)
    node = federation.start_supernode(site)
    federation.wait_for("the site refuses an expired certificate", ends(node))
    assert node.process.returncode == 1 and "certificate has expired" in node.log

    assert "made     server.crt" in federation.make_certificates()
    federation.programs["superlink"].stop()
    federation.start_superlink()
    assert federation.giva("superlink", "check")["days_left"] > 300
    approve(federation, site)
    connected = federation.start_supernode(site)
    federation.wait_for_sites(site)

    # one that was connected gives up as well, and has to end: only then whoever keeps it running starts it again
    federation.programs["superlink"].stop()
    (federation.keys / "server.crt").unlink()
    federation.make_certificates("--days", 0)
    federation.start_superlink()
    federation.wait_for("a connected site ends at an expired certificate", ends(connected))
    assert "certificate has expired" in connected.log


def test_another_authority_is_not_trusted(federation: LiveFederation, tmp_path: Path) -> None:
    other = LiveFederation(tmp_path, federation.model, federation.data)
    other.make_certificates()
    node = federation.start_supernode(SITES[0], authority=other.keys / "ca.crt")
    federation.wait_for("the site refuses a stranger's certificate", ends(node))
    assert node.process.returncode == 1 and "certificate verify failed" in node.log
    federation.giva("superlink", "add", "here", federation.address, "--root-certificates", other.keys / "ca.crt")
    told = federation.giva("site", "list", exit_code=1)["message"]
    assert "has a certificate that is not trusted" in told and "get the authority's ca.crt" in told
