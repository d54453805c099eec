"""The run store: what is recorded comes back, and is found."""

from __future__ import annotations

import math
import re
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from filled_store import VERSIONS, fill, other_record, state, stored_value, train_record

from giva_core.config import RunConfig
from giva_core.errors import CheckpointError, StoreError
from giva_core.types import RoundRecord, SiteRecord
from server.run_store import RunStore, default_root

STATE = {"z.lambda_o": np.arange(5, dtype=np.float32), "a.lambda_s": np.ones(3, np.float32)}


# -- runs --------------------------------------------------------------------------------------------------------------


def test_default_root_follows_giva_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIVA_HOME", str(tmp_path))
    assert default_root() == tmp_path / "store"
    monkeypatch.delenv("GIVA_HOME")
    assert default_root() == Path.home() / ".giva" / "store"


def test_reading_a_store_that_is_not_there_makes_nothing(store: RunStore) -> None:
    assert store.runs() == []
    assert store.rounds("none") == []
    assert store.last_state("none") is None
    assert not store.root.exists()


def test_run_ids_are_unique_and_runs_come_newest_first(store: RunStore) -> None:
    ids = [store.create_run(RunConfig(), "simulation", {}) for _ in range(5)]
    assert len(set(ids)) == 5
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run_id) for run_id in ids)
    assert [run.run_id for run in store.runs()] == ids[::-1]
    assert all(store.run_folder(run_id).is_dir() for run_id in ids)


def test_a_run_comes_back_with_everything(store: RunStore) -> None:
    config = RunConfig.from_flat({"name": "trial", "giva.rank": 3, "task.labels": ["no", "yes"]})
    run_id = store.create_run(config, "flower", VERSIONS)
    found = store.run(run_id)
    assert (found.name, found.status, found.engine, found.versions) == ("trial", "running", "flower", VERSIONS)
    assert found.config == config
    assert found.rounds_done == 0 and found.eval_loss is None and found.metrics == {}


def test_status_and_facts_accumulate(store: RunStore, run_id: str) -> None:
    store.set_facts(run_id, {"bases_digest": "ab", "sites": 3})
    store.set_facts(run_id, {"bases_digest": "cd"})
    store.set_status(run_id, "failed", "quorum")
    found = store.run(run_id)
    assert found.facts == {"bases_digest": "cd", "sites": 3}
    assert (found.status, found.reason) == ("failed", "quorum")


def test_an_unknown_status_is_refused(store: RunStore, run_id: str) -> None:
    with pytest.raises(StoreError, match="running, completed"):
        store.set_status(run_id, "done")


def test_runs_are_found_by_id_prefix_and_last(tmp_path: Path) -> None:
    store, first, second = fill(tmp_path)
    assert store.run("last").run_id == second
    assert store.run(first).run_id == first
    shared = next(index for index, (mine, other) in enumerate(zip(first, second, strict=True)) if mine != other)
    assert store.run(first[: shared + 1]).run_id == first


def test_an_unknown_run_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    store, first, second = fill(tmp_path)
    with pytest.raises(StoreError, match=rf"(?s)'nope'.*{second}.*{first}"):
        store.run("nope")
    with pytest.raises(StoreError, match="no run ''"):
        store.run("")


def test_an_ambiguous_prefix_is_refused(tmp_path: Path) -> None:
    store, first, _ = fill(tmp_path)
    with pytest.raises(StoreError, match="2 runs"):
        store.run(first[:4])


def test_writing_to_an_unknown_run_is_refused(store: RunStore, run_id: str) -> None:
    for write in (
        lambda: store.set_status("other", "failed"),
        lambda: store.set_facts("other", {"a": 1}),
        lambda: store.record("other", RoundRecord("train", 1)),
    ):
        with pytest.raises(StoreError, match="no run 'other'"):
            write()


def test_settings_of_another_version_do_not_hide_the_run(store: RunStore, run_id: str) -> None:
    with sqlite3.connect(store.database) as db:
        db.execute("""UPDATE runs SET settings = '{"giva.colour": "red", "method": "giva"}'""")
    assert store.run("last").settings["method"] == "giva"
    with pytest.raises(StoreError, match=r"giva\.colour.*0\.1\.0"):
        _ = store.run("last").config


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_records_come_back_equal_and_in_order(store: RunStore, run_id: str) -> None:
    records = [other_record("hello", 8, 16), other_record("calibrate", 400, 40), train_record(1), train_record(2)]
    for record in reversed(records):
        store.record(run_id, record)
    assert store.rounds(run_id) == records
    assert store.rounds(run_id, "train") == records[2:]
    assert list(store.rounds(run_id, "train")[0].metrics) == list(records[2].metrics)


def test_a_diverged_run_is_not_read_as_unmeasured(store: RunStore, run_id: str) -> None:
    sites = (SiteRecord("a", "ok", train_loss=math.nan, metrics={"mcc": math.nan}),)
    store.record(run_id, RoundRecord("train", 1, sites, train_loss=math.nan, eval_loss=math.inf))
    found = store.rounds(run_id)[0]
    assert math.isnan(found.train_loss) and found.eval_loss == math.inf and found.aggregation_error is None
    assert math.isnan(found.sites[0].train_loss) and math.isnan(found.sites[0].metrics["mcc"])
    assert math.isnan(store.run(run_id).train_loss)


def test_the_summary_adds_up_the_phases(tmp_path: Path) -> None:
    store, first, _ = fill(tmp_path)
    summary, records = store.run(first), store.rounds(first)
    assert summary.rounds_done == 5
    assert summary.bytes_up == sum(record.bytes_up for record in records)
    assert summary.bytes_down == sum(record.bytes_down for record in records)
    assert summary.eval_loss == records[-1].eval_loss
    assert summary.metrics == records[-1].metrics


def test_the_summary_takes_losses_from_the_last_evaluated_round(store: RunStore, run_id: str) -> None:
    store.record(run_id, train_record(1))
    store.record(run_id, replace(train_record(2), eval_loss=None, metrics={}))
    summary = store.run(run_id)
    assert summary.eval_loss == train_record(1).eval_loss and summary.metrics == train_record(1).metrics
    assert summary.train_loss == train_record(2).train_loss


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (RoundRecord("lunch", 1), "no such phase"),
        (RoundRecord("train", 1, (SiteRecord("a", "ok"), SiteRecord("a", "ok"))), "one name"),
    ],
)
def test_malformed_records_are_refused(store: RunStore, run_id: str, record: RoundRecord, match: str) -> None:
    with pytest.raises(StoreError, match=match):
        store.record(run_id, record)
    assert store.rounds(run_id) == []


def test_extra_without_a_state_is_refused(store: RunStore, run_id: str) -> None:
    with pytest.raises(StoreError, match="without arrays"):
        store.record(run_id, RoundRecord("train", 1), extra=state(1))


# -- states ------------------------------------------------------------------------------------------------------------


def test_arrays_come_back_in_the_order_they_went(store: RunStore, run_id: str) -> None:
    arrays = {**STATE, "view": np.arange(24.0).reshape(4, 6)[:, ::2], "scalar": np.float64(7), "none": np.zeros((0, 2))}
    store.record(run_id, RoundRecord("train", 1), arrays, {"momentum": np.arange(3)})
    found = store.last_state(run_id)
    assert found is not None and (found.phase, found.round) == ("train", 1)
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype and found.arrays[name].shape == np.shape(array)
    np.testing.assert_array_equal(found.extra["momentum"], np.arange(3))


def test_files_have_readable_names(store: RunStore, run_id: str) -> None:
    store.record(run_id, RoundRecord("train", 12), STATE, STATE)
    names = sorted(path.name for path in store.run_folder(run_id).iterdir())
    assert names == ["train-0012.extra.safetensors", "train-0012.safetensors"]
    assert safetensors.numpy.load_file(store.run_folder(run_id) / names[1]).keys() == STATE.keys()


def test_last_state_prefers_training_and_the_highest_round(store: RunStore, run_id: str) -> None:
    store.record(run_id, RoundRecord("train", 9), state(9))
    store.record(run_id, RoundRecord("train", 10), state(10))
    store.record(run_id, RoundRecord("head", 30), state(30))
    store.record(run_id, RoundRecord("train", 11))
    assert stored_value(store, run_id) == 10


def test_head_rounds_count_until_training_starts(store: RunStore, run_id: str) -> None:
    assert store.last_state(run_id) is None
    store.record(run_id, RoundRecord("head", 2), state(2))
    found = store.last_state(run_id)
    assert found is not None and (found.phase, found.round, found.extra) == ("head", 2, {})


def test_a_second_record_replaces_the_first(store: RunStore, run_id: str) -> None:
    for value in range(1, 5):
        store.record(run_id, train_record(value), state(value), state(-value))
        store.record(run_id, replace(train_record(1), seconds=float(value)), state(10 * value), None)
    assert store.rounds(run_id, "train")[0].seconds == 4.0
    with sqlite3.connect(store.database) as db:
        assert db.execute("SELECT count(*) FROM sites WHERE round = 1").fetchone() == (4,)
    store.record(run_id, train_record(5), state(50))
    store.record(run_id, train_record(5))
    assert stored_value(store, run_id) == 4
    recorded = {path.name.split(".")[0] for path in store.run_folder(run_id).iterdir()}
    assert recorded == {"train-0001", "train-0002", "train-0003", "train-0004"}


# -- blobs -------------------------------------------------------------------------------------------------------------


def test_blobs_come_back_and_are_checked(store: RunStore, run_id: str) -> None:
    store.save_blob(
        run_id, "sketches", {"Y/b": np.arange(6, dtype=np.int16).reshape(2, 3), "Y/a": np.ones(2, np.int32)}
    )
    store.save_blob(run_id, "sketches", {"Y/b": np.arange(8, dtype=np.int16), "Y/a": np.ones(2, np.int32)})
    found = store.load_blob(run_id, "sketches")
    assert list(found) == ["Y/b", "Y/a"] and found["Y/b"].dtype == np.int16 and found["Y/b"].shape == (8,)
    assert store.last_state(run_id) is None
    (file,) = store.run_folder(run_id).glob("sketches*")
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="sketches"):
        store.load_blob(run_id, "sketches")


def test_an_absent_blob_is_named(store: RunStore, run_id: str) -> None:
    with pytest.raises(CheckpointError, match="no blob 'sketches'"):
        store.load_blob(run_id, "sketches")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "train-0001", "a.b"])
def test_names_that_could_hit_another_file_are_refused(store: RunStore, run_id: str, name: str) -> None:
    with pytest.raises(StoreError, match="cannot have this name"):
        store.save_blob(run_id, name, state(1))
