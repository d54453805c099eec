"""`giva run` and `giva round`: what programs and people are told."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filled_store import SITES, fill

from giva_core.types import RoundRecord
from server.cli.main import cli
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


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, str, str]:
    return fill(tmp_path_factory.mktemp("store"))


@pytest.fixture
def giva(filled: tuple[RunStore, str, str]) -> Callable[..., Result]:
    environment = {"GIVA_STORE": str(filled[0].root)}
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments], env=environment)


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


def test_run_resume_hands_the_run_over(
    giva: Callable[..., Result], filled: tuple[RunStore, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resume(run_id: str, store: RunStore, watch: Callable[[RoundRecord], None]) -> str:
        watch(RoundRecord("train", 3))
        return run_id

    monkeypatch.setattr("server.simulate.resume", resume)
    done = giva("run", "resume", "last", "--json")
    assert done.exit_code == 0 and done.stderr.startswith("round 3/")
    assert json.loads(done.stdout)["data"]["run_id"] == filled[2]


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
