"""The run store under failure: a failed or killed write leaves no trace, damage is noticed, processes take turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filled_store import state, stored_value, train_record

from giva_core.config import RunConfig
from giva_core.errors import CheckpointError, StoreError
from giva_core.types import RoundRecord
from server import run_store, store_rows
from server.run_store import RunStore

# -- failed writes, damaged files --------------------------------------------------------------------------------------


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
