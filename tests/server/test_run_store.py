"""The run store: what is recorded comes back; what fails leaves no trace; damage is noticed."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from filled_store import VERSIONS, fill, other_record, train_record

from giva_core.config import RunConfig
from giva_core.errors import CheckpointError, StoreError
from giva_core.types import RoundRecord, SiteRecord
from server import run_store, store_rows
from server.run_store import RunStore, default_root

STATE = {"z.lambda_o": np.arange(5, dtype=np.float32), "a.lambda_s": np.ones(3, np.float32)}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "store")


@pytest.fixture
def run_id(store: RunStore) -> str:
    return store.create_run(RunConfig(), "simulation", VERSIONS)


def state(value: float) -> dict[str, np.ndarray]:
    return {"layer.lambda_o": np.full((4, 3), value, np.float32)}


def stored_value(store: RunStore, run_id: str) -> float:
    found = store.last_state(run_id)
    assert found is not None
    return float(found.arrays["layer.lambda_o"][0, 0])


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


def fail_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace_nothing(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_store.os, "replace", replace_nothing)


def fail_second_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    really = os.replace

    def replace_once(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        really(source, target)

    monkeypatch.setattr(run_store.os, "replace", replace_once)


def fail_database(monkeypatch: pytest.MonkeyPatch) -> None:
    def insert_nothing(*args: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(run_store, "insert_round", insert_nothing)


@pytest.mark.parametrize("fail", [fail_replace, fail_second_replace, fail_database])
@pytest.mark.parametrize("number", [3, 4])
def test_a_failed_record_leaves_the_earlier_state(
    store: RunStore, run_id: str, fail: Callable[[pytest.MonkeyPatch], None], number: int
) -> None:
    store.record(run_id, train_record(3), state(3), state(-3))
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        with pytest.raises(StoreError, match=r"full|No space.*Remedy"):
            store.record(run_id, replace(train_record(number), seconds=99.0), state(99), state(-99))
    assert stored_value(store, run_id) == 3
    assert store.rounds(run_id) == [train_record(3)]
    assert not list(store.run_folder(run_id).glob("*.tmp")) + list(store.run_folder(run_id).glob(".*"))
    store.record(run_id, train_record(number), state(5), state(-5))
    found = store.last_state(run_id)
    assert found is not None and found.round == number
    assert found.arrays["layer.lambda_o"].max() == 5 and found.extra["layer.lambda_o"].max() == -5


KILLED = """
import os, sys
import numpy as np
from giva_core.types import RoundRecord
from server import run_store
from server.run_store import RunStore

point, root, run_id, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
die = lambda *args: os._exit(9)
if point == "replace":
    run_store.os.replace = die
elif point == "insert":
    run_store.insert_round = die
else:  # after the commit, before replaced files are removed
    run_store.Path.unlink = lambda path, missing_ok=False: die() if path.suffix == ".safetensors" else None
RunStore(root).record(run_id, RoundRecord("train", number, seconds=99.0), {"layer.lambda_o": np.full((4, 3), 99, "f4")})
"""


@pytest.mark.parametrize(("point", "survives"), [("replace", False), ("insert", False), ("unlink", True)])
def test_a_killed_process_leaves_one_state_or_the_other(
    store: RunStore, run_id: str, point: str, survives: bool
) -> None:
    store.record(run_id, train_record(3), state(3))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, point, str(store.root), run_id, "3"]
    assert subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}).returncode == 9
    assert stored_value(store, run_id) == (99 if survives else 3)
    assert store.rounds(run_id)[0].seconds == (99.0 if survives else train_record(3).seconds)
    store.record(run_id, train_record(4), state(4))
    assert stored_value(store, run_id) == 4


def test_a_changed_file_is_noticed(store: RunStore, run_id: str) -> None:
    store.record(run_id, RoundRecord("train", 1), state(1))
    file = store.run_folder(run_id) / "train-0001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"train-0001\.safetensors is not what was recorded"):
        store.last_state(run_id)


def test_a_missing_file_is_noticed(store: RunStore, run_id: str) -> None:
    store.record(run_id, RoundRecord("train", 1), state(1), state(2))
    (store.run_folder(run_id) / "train-0001.extra.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"train-0001\.extra\.safetensors cannot be read"):
        store.last_state(run_id)


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


# -- several processes -------------------------------------------------------------------------------------------------


def test_only_one_holder_of_the_lock(store: RunStore, run_id: str) -> None:
    with (
        store.locked(run_id),
        pytest.raises(StoreError, match=f"pid {os.getpid()}"),
        RunStore(store.root).locked(run_id),
    ):
        pytest.fail("the lock was given twice")
    with RunStore(store.root).locked(run_id):
        assert (store.run_folder(run_id) / "lock").read_text() == str(os.getpid())


def test_the_lock_is_free_after_an_error(store: RunStore, run_id: str) -> None:
    with pytest.raises(ValueError, match="boom"), store.locked(run_id):
        raise ValueError("boom")
    with store.locked(run_id):
        assert store.run(run_id).status == "running"


def test_locking_an_unknown_run_is_an_error(store: RunStore) -> None:
    with pytest.raises(StoreError, match="cannot be locked"), store.locked("none"):
        pytest.fail("a run that does not exist was locked")


def make_runs(root: Path) -> list[str]:
    store = RunStore(root)
    return [store.create_run(RunConfig(), "simulation", {}) for _ in range(4)]


def test_processes_that_start_together_share_a_new_store(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        made = pool.map(make_runs, [tmp_path / "new"] * 4)
    ids = {run_id for part in made for run_id in part}
    assert len(ids) == 16
    assert {run.run_id for run in RunStore(tmp_path / "new").runs()} == ids


def test_a_new_store_waits_for_a_process_that_makes_it_too(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with ThreadPoolExecutor(1) as pool, contextlib.closing(sqlite3.connect(store.database)) as other:
        other.execute("BEGIN IMMEDIATE")  # SQLite does not wait for this lock by itself where it switches
        made = pool.submit(store.create_run, RunConfig(), "simulation", {})
        with pytest.raises(TimeoutError):
            made.result(timeout=0.3)
        other.execute("COMMIT")
        assert store.run(made.result(timeout=20)).status == "running"


def test_readers_see_whole_rounds_while_a_writer_replaces_them(store: RunStore, run_id: str) -> None:
    store.record(run_id, train_record(1), state(0), state(0))

    def read() -> bool:
        found = store.last_state(run_id)
        (record,) = store.rounds(run_id)
        assert found is not None and len(record.sites) == 4
        return bool(np.all(found.arrays["layer.lambda_o"] == found.extra["layer.lambda_o"]))

    with ThreadPoolExecutor(4) as pool:
        reads = []
        for value in range(1, 26):
            reads += [pool.submit(read) for _ in range(2)]
            store.record(run_id, train_record(1), state(value), state(value))
    assert all(done.result() for done in reads)
    assert stored_value(store, run_id) == 25


# -- the database ------------------------------------------------------------------------------------------------------


def test_a_newer_schema_is_refused(store: RunStore, run_id: str) -> None:
    with sqlite3.connect(store.database) as db:
        db.execute(f"PRAGMA user_version = {store_rows.SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match=r"newer version.*upgrade fedgiva"):
        store.runs()


def test_a_file_that_is_no_database_is_an_error_with_a_remedy(store: RunStore) -> None:
    store.root.mkdir()
    store.database.write_bytes(b"not a database, but long enough to look like one" * 40)
    with pytest.raises(StoreError, match=r"not a database.*Remedy"):
        store.runs()


def test_a_root_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Remedy"):
        RunStore(tmp_path / "file" / "store").create_run(RunConfig(), "simulation", {})
