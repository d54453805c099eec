"""`giva run` and `giva round`: what programs and people are told, and what a SuperLink is asked."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filled_store import SITES, fill

from giva_core.config import RunConfig
from giva_core.types import RoundRecord
from server.cli.main import cli
from server.connections import Connection
from server.flower import SuperLink
from server.run_store import RunStore

SUMMARY = {
    *("run_id", "name", "status", "reason", "engine", "method", "created", "updated", "rounds_done", "num_rounds"),
    *("train_loss", "eval_loss", "metrics", "bytes_up", "bytes_down", "seconds"),
}
ROUND = {
    *("phase", "round", "total_examples", "train_loss", "eval_loss", "metrics", "aggregation_error"),
    *("bytes_up", "bytes_down", "seconds", "sites_ok", "sites_sampled"),
}
SITE = {
    *("site", "status", "reason", "num_examples", "num_steps", "train_loss", "train_seconds", "eval_examples"),
    *("eval_loss", "metrics", "bytes_up", "bytes_down"),
}


def data_of(done: Result, kind: str) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    envelope = json.loads(done.stdout)
    assert (envelope["schema"], envelope["kind"]) == (1, kind)
    return envelope["data"]


def test_run_list(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    _, first, second = filled
    data = data_of(giva("run", "list", "--json"), "run-list")
    assert set(data) == {"store", "total", "runs"} and data["total"] == 2
    assert [run["run_id"] for run in data["runs"]] == [second, first]
    assert all(set(run) == SUMMARY for run in data["runs"])
    lines = giva("run", "list").stdout.split("\n")
    assert lines[1].split()[:6] == [second, "baseline", "failed", "giva", "2/5", "0.9793"]
    assert lines[2].split()[:3] == [first, "medical", "completed"] and "MiB" in lines[2]


def test_run_list_is_limited_and_says_so(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    assert len(data_of(giva("run", "list", "--limit", 1, "--json"), "run-list")["runs"]) == 1
    shown = giva("run", "list", "--limit", 1).stdout
    assert filled[1] not in shown and "1 older runs are not shown" in shown


def test_an_empty_store_is_no_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["run", "list", "--store", str(tmp_path / "none")])
    assert done.exit_code == 0 and done.stdout == f"There are no runs in {tmp_path / 'none'} yet.\n"
    assert not (tmp_path / "none").exists()


def test_run_show(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    store, first, _ = filled
    data = data_of(giva("run", "show", first, "--json"), "run-show")
    assert set(data) == SUMMARY | {
        *("config", "changed", "config_digest", "versions", "facts", "phases", "folder", "adapter"),
    }
    assert data["changed"] == {
        "name": {"value": "medical", "default": ""},
        "giva.rank": {"value": 4, "default": 8},
        "task.labels": {"value": '["no", "yes"]', "default": "[]"},
    }
    assert data["config_digest"] == store.run(first).config.digest()
    assert [phase["phase"] for phase in data["phases"]] == ["hello", "calibrate", "train"]
    assert sum(phase["bytes_up"] for phase in data["phases"]) == data["bytes_up"] == store.run(first).bytes_up
    assert {"phase", "rounds", "sites", "bytes_up", "bytes_down", "seconds"} == set(data["phases"][0])
    shown = giva("run", "show", first).stdout
    assert "bases_digest" in shown and "ab12" * 16 in shown
    assert "giva.rank    4" in shown
    assert "1.500 MiB" in shown


def test_run_show_takes_the_newest_run_unasked(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    data = data_of(giva("run", "show", "--json"), "run-show")
    assert data["run_id"] == filled[2] and data["reason"] == "quorum: 1 of 2 updates"


def test_run_show_of_another_version_still_shows(tmp_path: Path) -> None:
    store, first, _ = fill(tmp_path)
    with sqlite3.connect(store.database) as db:
        db.execute("""UPDATE runs SET settings = '{"giva.colour": "red", "method": "giva"}'""")
    done = CliRunner().invoke(cli, ["run", "show", first, "--store", str(tmp_path)])
    assert done.exit_code == 0 and "giva.colour  red" in done.stdout and "cannot be read by this version" in done.stdout


def test_run_resume_hands_a_simulated_run_over(
    giva: Callable[..., Result], filled: tuple[RunStore, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resume(run_id: str, store: RunStore, watch: Callable[[RoundRecord], None]) -> str:
        watch(RoundRecord("train", 3))
        return run_id

    monkeypatch.setattr("server.simulate.resume", resume)
    done = giva("run", "resume", filled[1], "--json")
    assert done.exit_code == 3 and done.stderr.startswith("round 3/")  # 3: a site was missing once
    assert json.loads(done.stdout)["data"]["run_id"] == filled[1]


# -- runs on a SuperLink ----------------------------------------------------------------------------------------------


class FakeLink:
    """A SuperLink that takes everything and remembers it."""

    connection = Connection("here", "127.0.0.1:1")

    def __init__(self, store: RunStore) -> None:
        self.store, self.started, self.stopped, self.status = store, [], [], "finished:failed"
        self.during_log: Callable[[], object] = lambda: None

    def start_run(self, app: Path, config: RunConfig) -> str:
        self.started.append((app, config))
        return f"{7_000_000_000_000_000_000 + len(self.started)}"

    def stop_run(self, flower_run_id: str) -> bool:
        self.stopped.append(flower_run_id)
        return True

    def stream_log(self, flower_run_id: str) -> None:
        self.during_log()

    def run_status(self, flower_run_id: str) -> str:
        return self.status


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLink:
    """A SuperLink, and a store with one run on it that has done two of five rounds."""
    store, _, second = fill(tmp_path)
    store.set_facts(second, {"flower_run_id": "7645786948656554014"})
    store.set_status(second, "running")
    made = FakeLink(store)
    monkeypatch.setattr(SuperLink, "find", lambda name: made)
    monkeypatch.setenv("GIVA_STORE", str(tmp_path))
    return made


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_run_start_sends_the_file_and_what_overrides_it(link: FakeLink, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('name = "medical"\n[giva]\nrank = 4\n')
    data = data_of(call("run", "start", file, "--set", "giva.rank=3", "--json"), "run-submitted")
    assert data == {"flower_run_id": "7000000000000000001", "superlink": "here"}
    [(app, config)] = link.started
    assert (app / "pyproject.toml").exists() and (config.name, config.giva.rank) == ("medical", 3)


def test_run_start_takes_no_file_that_continues_a_run(link: FakeLink, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('resume = "20261122"\n')
    done = call("run", "start", file)
    assert done.exit_code == 2 and "giva run resume" in done.stderr and link.started == []


def test_run_start_that_streams_tells_how_the_run_ended(link: FakeLink, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('name = "medical"\n')
    start = ("run", "start", file, "--stream", "--json")

    assert data_of_failed(call(*start))["status"] == "finished:failed"

    def fail() -> None:
        run_id = link.store.create_run(link.started[-1][1], "flower", {})
        link.store.set_facts(run_id, {"flower_run_id": "7000000000000000002"})
        link.store.set_status(run_id, "failed", "too few sites")

    link.during_log = fail
    assert data_of_failed(call(*start))["run_id"] == link.store.run("last").run_id

    def complete() -> None:
        run_id = link.store.create_run(link.started[-1][1], "flower", {})
        link.store.set_facts(run_id, {"flower_run_id": "7000000000000000003"})
        link.store.set_status(run_id, "completed")

    link.during_log, link.status = complete, "finished:completed"
    assert data_of(call(*start), "run-finished")["run_id"] == link.store.run("last").run_id


def data_of_failed(done: Result) -> dict[str, Any]:
    assert done.exit_code == 1
    return json.loads(done.stdout)["data"]


def test_run_resume_hands_a_run_back_to_its_superlink(link: FakeLink) -> None:
    run = link.store.run("last")
    assert data_of(call("run", "resume", "--json"), "run-submitted")["flower_run_id"] == "7000000000000000001"
    assert link.stopped == ["7645786948656554014"]
    assert [config for _, config in link.started] == [run.config.replace(resume=run.run_id)]
    assert link.store.run("last").facts["flower_run_id"] == "7000000000000000001"


def test_run_resume_leaves_a_run_alone_that_a_process_advances(link: FakeLink) -> None:
    with link.store.locked(link.store.run("last").run_id):
        done = call("run", "resume")
    assert done.exit_code == 1 and "another process advances run" in done.stderr
    assert link.started == [] and link.stopped == []


def test_run_resume_of_a_completed_run_shows_it(link: FakeLink) -> None:
    link.store.set_status(link.store.run("last").run_id, "completed")
    assert data_of(call("run", "resume", "--json"), "run-finished")["rounds_done"] == 2
    assert link.started == []


def test_run_stop_ends_the_run_and_says_how_to_go_on(link: FakeLink) -> None:
    run_id = link.store.run("last").run_id
    done = call("run", "stop", "last")
    assert done.exit_code == 0 and f"giva run resume {run_id}" in done.stdout
    assert link.stopped == ["7645786948656554014"]
    assert (link.store.run("last").status, link.store.run("last").reason) == ("stopped", "stopped by the operator")
    done = call("run", "stop", "last")
    assert done.exit_code == 1 and "has ended; got status stopped" in done.stderr


def test_run_stop_waits_for_the_process_to_let_go(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.deployed._LEAVE_SECONDS", 0.0)
    with link.store.locked(link.store.run("last").run_id):
        done = call("run", "stop", "last")
    assert done.exit_code == 1 and "another process advances run" in done.stderr
    assert link.store.run("last").status == "running"


def test_run_stop_takes_flower_s_id_known_here_or_not(link: FakeLink) -> None:
    data = data_of(call("run", "stop", "7645786948656554014", "--json"), "run-stop")
    assert data == {
        "flower_run_id": "7645786948656554014",
        "run_id": link.store.run("last").run_id,
        "was_running": True,
    }
    data = data_of(call("run", "stop", "7000000000000000009", "--json"), "run-stop")
    assert data["run_id"] is None and link.stopped[-1] == "7000000000000000009"


def test_run_stop_is_for_runs_on_a_superlink(link: FakeLink) -> None:
    done = call("run", "stop", link.store.runs()[1].run_id)
    assert done.exit_code == 1 and "is not on a SuperLink" in done.stderr


# -- rounds -----------------------------------------------------------------------------------------------------------


def test_round_list(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    data = data_of(giva("round", "list", filled[1], "--json"), "round-list")
    assert set(data) == {"run_id", "metric", "rounds"} and data["metric"] == "accuracy"
    assert all(set(record) == ROUND for record in data["rounds"])
    third = data["rounds"][4]
    assert (third["round"], third["sites_ok"], third["sites_sampled"]) == (3, 3, 4)
    lines = giva("round", "list", filled[1]).stdout.split("\n")
    assert "worst site" in lines[1] and "aggregation error" in lines[1]
    assert lines[2].split() == ["hello", "1", "4/4", "0", *"-----", "2.000", "KiB", "512", "B", "0.5000"]
    assert lines[6].split()[:4] == ["train", "3", "3/4", "520"]


def test_round_show(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    data = data_of(giva("round", "show", filled[1], 3, "--json"), "round-show")
    assert set(data) == ROUND | {"run_id", "sites"}
    assert [site["site"] for site in data["sites"]] == list(SITES)
    assert all(set(site) == SITE for site in data["sites"])
    shown = giva("round", "show", filled[1], 3).stdout
    assert "missing" in shown and "no answer within 60 s" in shown and "worst_accuracy" in shown


def test_round_show_of_another_phase(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    data = data_of(giva("round", "show", filled[1], 1, "--phase", "calibrate", "--json"), "round-show")
    assert data["bytes_up"] == 1_572_864 and data["phase"] == "calibrate"


def test_a_round_that_is_not_there_names_those_that_are(giva: Callable[..., Result]) -> None:
    done = giva("round", "show", "last", 9)
    assert done.exit_code == 1 and "train 1, train 2" in done.stderr and "giva round list" in done.stderr


@pytest.mark.parametrize("command", [("run", "show"), ("run", "resume"), ("round", "list"), ("metrics", "show")])
def test_an_unknown_run_exits_with_1(giva: Callable[..., Result], command: tuple[str, str]) -> None:
    done = giva(*command, "nope")
    assert done.exit_code == 1 and "there is no run 'nope'" in done.stderr and done.stdout == ""
