"""Other kinds of tasks and other methods over a real SuperLink: each run ends as its simulation does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from live_federation import LiveFederation, run_file
from task_kinds import KINDS, OPEN, SITES, deployed, kind_config, write_kind

from giva_core.config import RunConfig

pytestmark = pytest.mark.deploy

Start = Callable[[Path, Path, Mapping[str, str]], LiveFederation]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a SuperLink with TLS and keys, the server and both sites; in a short folder, for Unix sockets."""
    started: list[LiveFederation] = []

    def federation(model: Path, data: Path, data_table: Mapping[str, str]) -> LiveFederation:
        folder = Path(tempfile.mkdtemp(prefix="giva-"))
        made = LiveFederation(folder, model, data, {"data": data_table, "policy": OPEN})
        started.append(made)
        made.make_certificates(*(part for site in SITES for part in ("--site", site)))
        made.start_superlink()
        made.giva("superlink", "add", "here", made.address, "--root-certificates", made.keys / "ca.crt")
        for site in SITES:
            made.giva("site", "approve", made.keys / f"{site}.pub", "--name", site)
        made.start_server()
        for site in SITES:
            made.start_site_in_parts(site)
        made.wait_for_sites(*SITES)
        return made

    yield federation
    for made in started:
        made.stop()
        shutil.rmtree(made.folder)


def run_both(federation: LiveFederation, config: RunConfig) -> dict[str, Any]:
    """Run it over the SuperLink, and simulate it; returns the former's report."""
    asked = deployed(config).replace(rounds__join_seconds=120.0)
    found = federation.giva("run", "start", run_file(federation.folder, asked), "--stream")
    assert found["status"] == "completed", found
    assert found["rounds_done"] == config.rounds.num_rounds and found["troubles"] == []
    before = dict(federation.environment)
    federation.environment |= {"GIVA_SIMULATION": "1", "GIVA_HOME": str(federation.folder / "simulated")}
    simulated = federation.giva("simulate", run_file(federation.folder, config))
    federation.environment = before
    for digest in ("bases_digest", "arrays_digest"):
        assert found["facts"].get(digest) == simulated["facts"].get(digest)
    assert found["facts"]["arrays_digest"] and found["metrics"] == simulated["metrics"]
    return found


@pytest.mark.parametrize("case", ["causal-lm", "image-classification"])
def test_a_kind_of_task_ends_as_its_simulation(case: str, start: Start, tmp_path: Path) -> None:
    model = write_kind(tmp_path, case)
    federation = start(model, tmp_path / "sites", KINDS[case].data)
    found = run_both(federation, kind_config(case, tmp_path, model))
    assert KINDS[case].metrics <= found["metrics"].keys() and found["facts"]["bases_digest"]


def test_methods_without_calibration_end_as_their_simulations(
    start: Start, toy_config: RunConfig, toy_model: Path, toy_folder: Path, tmp_path: Path
) -> None:
    for site in SITES:
        shutil.copytree(toy_folder / site, tmp_path / "sites" / site)
    federation = start(toy_model, tmp_path / "sites", {})
    config = toy_config.replace(
        data__folder=str(tmp_path / "sites"), train__num_threads=1, rounds__num_rounds=2, rounds__min_sites=2
    )
    run_both(federation, config.replace(method="lora", lora__rank=3))
    found = run_both(federation, config.replace(giva__bases="random"))
    assert found["facts"]["bases_digest"]
    for site in SITES:
        status = federation.giva("site", "status", federation.folder / site / "site.toml")
        assert status["model_loads"] == 2 and status["refused"] == 0 and status["network"] != "host"
