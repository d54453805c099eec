"""What the benchmarks of accuracy rest on: runs found by their settings, resumed, forked after the head, and judged."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from giva_core.config import RunConfig
from giva_core.types import RoundRecord
from server.run_store import RunStore, default_root
from server.simulate import simulate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, with a store of its own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("GIVA_HOME", str(tmp_path / "home"))
    return importlib.import_module("_federated")


@pytest.fixture
def folder(tmp_path: Path, toy_folder: Path) -> Path:
    """A split as `giva data prepare` makes it: sites, and all their rows together."""
    made = tmp_path / "split"
    (made / "pooled").mkdir(parents=True)
    for site in sorted(toy_folder.iterdir()):
        (made / "sites" / site.name).mkdir(parents=True)
        for name, source in (("train", "train"), ("test", "test"), ("validation", "test")):
            (made / "sites" / site.name / f"{name}.jsonl").symlink_to(site / f"{source}.jsonl")
    for name, source in (("train", "train"), ("test", "test"), ("validation", "test")):
        rows = "".join((site / f"{source}.jsonl").read_text() for site in sorted(toy_folder.iterdir()))
        (made / "pooled" / f"{name}.jsonl").write_text(rows)
    return made


@pytest.fixture
def job(runs: ModuleType, folder: Path, toy_config: RunConfig, tmp_path: Path):
    """Makes jobs on the toy federation."""
    recipe = tmp_path / "toy.toml"
    flat = {**toy_config.to_flat(), "rounds.num-rounds": 2, "rounds.head-rounds": 2}
    recipe.write_text("".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in flat.items()))

    class Toy(runs.Dataset):
        recipe = property(lambda self: recipe)

        def folder(self, seed: int) -> Path:
            return folder

    def make(row: str = "giva", **more: object):
        return runs.Job(row, Toy("toy", 0), 0, **more)

    return make


def kill(runs: ModuleType, job: Any) -> None:
    """Begin a run that dies when it tells of its first training round."""

    class Killed(BaseException):
        pass

    def stop(record: RoundRecord, config: RunConfig) -> str:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs, "describe", stop)
        runs.outcome(job)


def state(run_id: str) -> dict[str, np.ndarray]:
    return RunStore(default_root()).last_state(run_id).arrays


@pytest.mark.parametrize(
    ("before", "settings"),
    [
        ({}, {"train.learning-rate": 0.02}),
        ({}, {"rounds.num-rounds": 1}),
        ({}, {"rounds.mode": "alternate"}),
        ({}, {"giva.rank": 3, "giva.oversampling": 2, "giva.power-passes": 0, "giva.sketch-bits": 20}),
        ({}, {"giva.init": "topsv", "giva.calibration-batches": 2, "giva.calibration-batch-size": 8}),
        ({}, {"giva.bases": "random"}),
        ({"wire.precision": "int8"}, {"wire.precision": "int8", "train.learning-rate": 0.02}),
    ],
)
def test_a_forked_run_ends_with_the_bytes_of_one_that_did_all_its_rounds(runs, job, tmp_path, before, settings):
    first = runs.outcome(job(settings=before))
    forked = runs.outcome(job(settings=settings))
    store = RunStore(default_root())
    seconds = [[record.seconds for record in store.rounds(one.run_id, "head")] for one in (first, forked)]
    assert (seconds[0] == seconds[1]) == (not before)
    alone = RunStore(tmp_path / "alone")
    whole = alone.last_state(simulate(store.run(forked.run_id).config, alone)).arrays
    assert {name: array.tobytes() for name, array in whole.items()} == {
        name: array.tobytes() for name, array in state(forked.run_id).items()
    }


@pytest.mark.parametrize("settings", [{"train.head-learning-rate": 0.02}, {"train.max-local-steps": 1}])
def test_head_rounds_that_see_another_setting_are_not_shared(runs, job, settings):
    first, other = runs.outcome(job()), runs.outcome(job(settings=settings))
    store = RunStore(default_root())
    heads = [store.state(one.run_id, "head", 1).arrays["classifier.weight"] for one in (first, other)]
    assert not np.array_equal(*heads)


def test_a_finished_run_and_its_outcome_are_found_and_a_killed_one_is_resumed(runs, job, monkeypatch):
    first = runs.outcome(job())
    with monkeypatch.context() as patched:
        patched.setattr(runs, "evaluate", lambda *args: pytest.fail("judged again"))
        assert runs.outcome(job()) == first

    store, wanted = RunStore(default_root()), job(settings={"giva.rank": 3})
    kill(runs, wanted)
    stopped = store.run("last").run_id
    assert runs.outcome(wanted).run_id == stopped and store.run(stopped).status == "completed"


def test_bases_of_one_site_and_of_the_pooled_rows_differ_from_the_federations(runs, job):
    store = RunStore(default_root())
    digests = {}
    for row, whose in (("giva-one-site", "one-site"), ("giva-pooled", "pooled"), ("giva", "")):
        made = runs.outcome(job(row, bases_of=whose))
        digests[row] = store.run(made.run_id).facts["bases_digest"]
        assert len(store.rounds(made.run_id, "train")[0].sites) == 3
    assert len(set(digests.values())) == 3
    lone = next(run for run in store.runs() if run.name == "bases-one-site-0")
    head = [store.state(run.run_id, "head", 2).arrays["classifier.weight"] for run in store.runs()]
    assert len(head) == 5 and all(np.array_equal(head[0], other) for other in head)
    assert runs.outcome(job("giva-pooled", bases_of="pooled")).total_bytes is None
    assert store.run(lone.run_id).facts["bases_digest"] == digests["giva-one-site"]
    assert lone.config.giva.calibration_batch_size == 3 * 16


def test_an_outcome_is_what_the_last_state_comes_to_on_the_rows_that_count(runs, job):
    made = runs.outcome(job())
    store = RunStore(default_root())
    records = store.rounds(made.run_id)
    assert made.accuracy == pytest.approx(records[-1].metrics["accuracy"])
    assert made.total_bytes == sum(record.bytes_up + record.bytes_down for record in records)
    assert (made.first_error, made.last_error) == tuple(
        record.aggregation_error for record in store.rounds(made.run_id, "train")
    )
    metrics, loss = runs.judged(job(), 2, "test.jsonl")
    assert metrics["accuracy"] == made.accuracy and loss == pytest.approx(made.loss)
    spent = runs.bytes_to(job(), 0.0, "test.jsonl")
    assert spent == sum(
        record.bytes_up + record.bytes_down
        for record in records
        if (record.phase, record.round) <= ("train", 1) or record.phase != "train"
    )
    assert runs.bytes_to(job(), 1.1, "test.jsonl") is None


def test_the_centre_is_one_site_with_everybodys_rows(runs, job):
    made = runs.outcome(job("giva-central", central=True))
    (site,) = RunStore(default_root()).rounds(made.run_id, "train")[0].sites
    assert (site.site, site.num_examples) == ("pooled", 24 + 32 + 40) and made.worst_accuracy is None
    assert dataclasses.asdict(made)["row"] == "giva-central"


def test_a_resumed_run_costs_what_a_whole_one_does(runs, job):
    whole = runs.outcome(job())
    store, wanted = RunStore(default_root()), job("again")
    kill(runs, wanted)
    resumed = runs.outcome(wanted)
    assert len(store.rounds(resumed.run_id, "hello")) == 2
    assert resumed.total_bytes == pytest.approx(whole.total_bytes, rel=0.01)


def test_rates_lie_in_their_grids_and_are_taken_over_only_where_the_grid_is_the_same(runs):
    accuracy = importlib.import_module("accuracy")
    for task, known in accuracy.TUNED.items():
        for name, rates in known.items():
            assert all(value in accuracy.ROWS[name].grid[key] for key, value in rates.items())
        for name, row in accuracy.ROWS.items():
            assert all(value in row.grid[key] for key, value in accuracy.tuned(task, name).items())
    assert accuracy.tuned("medical", "giva-exact") == accuracy.TUNED["medical"]["giva"]
    assert accuracy.tuned("medical", "giva-rowalign") == {"train.learning-rate": 0.01}
