"""Runs, rounds, metrics and checkpoints: one SQLite database and safetensors files, safe against being killed.

    <root>/runs.sqlite                              runs, rounds, sites, metrics, and the SHA-256 of every file
    <root>/<run_id>/train-0003.safetensors          the global state after training round 3
    <root>/<run_id>/train-0003.extra.safetensors    what the strategy keeps beside it
    <root>/<run_id>/<blob>.safetensors              aggregated sketches and the like
    <root>/<run_id>/adapter/                        the finished adapter
    <root>/<run_id>/lock                            held by the process that advances the run

A file counts only once the database names it. Files are written first, under a name the database does not use yet
(`train-0003.again.safetensors` where round 3 is recorded anew); then one transaction commits the records together with
the names and hashes; then replaced files are removed. A process killed at any point leaves the earlier state or the new
one, never a mixture, and readers need no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from giva_core.config import RunConfig
from giva_core.errors import CheckpointError, StoreError
from giva_core.paths import giva_home
from giva_core.settings import Scalar
from giva_core.types import Arrays, RoundRecord

from .array_files import read_arrays, serialise, write_atomically
from .store_rows import (
    PHASES,
    STATUSES,
    RunSummary,
    StoredState,
    begun,
    connected,
    file_row,
    insert,
    insert_round,
    read_rounds,
    read_summary,
)

__all__ = ["PHASES", "RunStore", "RunSummary", "StoredState", "default_root", "write_atomically"]


def default_root() -> Path:
    """`$GIVA_HOME/store`, or `~/.giva/store`."""
    return giva_home() / "store"


class RunStore:
    """All runs below one folder; may be used by several processes and threads at once.

    Nothing is created before the first write; a folder without a database reads as a store without runs. The folder
    has to be on a disk of this machine, for SQLite's write-ahead log does not work over a network.

    Args:
        root: The folder; `default_root()` is where the commands look.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.database = self.root / "runs.sqlite"

    # -- runs ----------------------------------------------------------------------------------------------------------

    def create_run(self, config: RunConfig, engine: str, versions: Mapping[str, str]) -> str:
        """Enter a new run, `running`, and make its folder.

        Returns:
            The run's id: UTC date and time and four random digits, `20261122-101530-3f2a`.

        Raises:
            StoreError: The store cannot be written.
        """
        now = datetime.now(UTC)
        with self._guarded("the run cannot be created"):
            self.root.mkdir(parents=True, exist_ok=True)
            run_id = self._new_folder(now)
            stamp = now.isoformat(timespec="seconds")
            settings = json.dumps(config.to_flat())
            row = (run_id, config.name, "running", "", engine, stamp, stamp, settings, json.dumps(dict(versions)), "{}")
            with self._transaction() as db:
                insert(db, "runs", row)
        return run_id

    def _new_folder(self, now: datetime) -> str:
        while True:
            run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            with contextlib.suppress(FileExistsError):
                (self.root / run_id).mkdir()
                return run_id

    def set_status(self, run_id: str, status: str, reason: str = "") -> None:
        """Set `running`, `completed`, `failed` or `stopped`, and why."""
        if status not in STATUSES:
            raise StoreError("a run cannot have this status", got=status, expected=f"one of {', '.join(STATUSES)}")
        with self._guarded("the run's status cannot be written"), self._transaction() as db:
            self._touch(db, run_id)
            db.execute("UPDATE runs SET status = ?, reason = ? WHERE run_id = ?", (status, reason, run_id))

    def set_facts(self, run_id: str, facts: Mapping[str, Scalar]) -> None:
        """Add to what is known about the run, e.g. `bases_digest`; a fact of the same name is replaced."""
        with self._guarded("the run's facts cannot be written"), self._transaction() as db:
            self._touch(db, run_id)
            (known,) = db.execute("SELECT facts FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            merged = json.dumps({**json.loads(known), **facts})
            db.execute("UPDATE runs SET facts = ? WHERE run_id = ?", (merged, run_id))

    def run(self, reference: str) -> RunSummary:
        """One run, by its id, by a prefix that no other run shares, or by `last`.

        Raises:
            StoreError: There is no such run, or more than one.
        """
        runs = self.runs()
        if reference == "last":
            found = runs[:1]
        else:
            exact = [run for run in runs if run.run_id == reference]
            found = exact or [run for run in runs if reference and run.run_id.startswith(reference)]
        newest = ", ".join(run.run_id for run in runs[:5])
        if not found:
            raise StoreError(
                f"there is no run '{reference}'",
                expected=f"one of {newest}" if runs else None,
                cause=None if runs else f"there are no runs below {self.root}",
                remedy="see `giva run list`, or choose another store with --store",
            )
        if len(found) > 1:
            ids = ", ".join(run.run_id for run in found[:5])
            raise StoreError(
                f"'{reference}' is not one run", got=f"{len(found)} runs, {ids}", remedy="give more of the id"
            )
        return found[0]

    def runs(self) -> list[RunSummary]:
        """All runs, newest first."""
        with self._guarded("the runs cannot be read"), self._snapshot() as db:
            return [read_summary(db, row) for row in db.execute("SELECT * FROM runs ORDER BY rowid DESC").fetchall()]

    def run_folder(self, run_id: str) -> Path:
        """The folder of the run's files."""
        return self.root / run_id

    def adapter_folder(self, run_id: str) -> Path:
        """Where the run's finished adapter is put."""
        return self.run_folder(run_id) / "adapter"

    # -- rounds --------------------------------------------------------------------------------------------------------

    def record(
        self, run_id: str, record: RoundRecord, arrays: Arrays | None = None, extra: Arrays | None = None
    ) -> None:
        """Keep a finished phase or round, as one step: after an error, or a kill, nothing of it is there.

        A second record of the same phase and round replaces the first.

        Args:
            run_id: The run's id.
            record: What happened.
            arrays: The global state after it, by name.
            extra: What the strategy keeps beside that state, by name.

        Raises:
            StoreError: The store cannot be written.
        """
        if record.phase not in PHASES:
            raise StoreError("a run has no such phase", got=record.phase, expected=f"one of {', '.join(PHASES)}")
        if extra and arrays is None:
            raise StoreError(
                "extra arrays need a state that they belong to", got=f"{record.phase} {record.round} without arrays"
            )
        if len({site.site for site in record.sites}) != len(record.sites):
            raise StoreError(
                "two sites have one name",
                got=sorted(site.site for site in record.sites),
                remedy="give every site its own name",
            )
        name = _state_name(record.phase, record.round)
        files: dict[str, Arrays | None] = {name: arrays, f"{name}.extra": extra}
        with self._guarded(f"{name} cannot be recorded"), self._replacing(run_id, files) as db:
            key = (run_id, record.phase, record.round)
            db.execute("DELETE FROM rounds WHERE run_id = ? AND phase = ? AND round = ?", key)
            insert_round(db, run_id, record)

    def amend(self, run_id: str, record: RoundRecord) -> None:
        """Replace a record by one that knows more; the state and the files that belong to it stay.

        Raises:
            StoreError: The store cannot be written.
        """
        name = _state_name(record.phase, record.round)
        with self._guarded(f"{name} cannot be amended"), self._transaction() as db:
            key = (run_id, record.phase, record.round)
            db.execute("DELETE FROM rounds WHERE run_id = ? AND phase = ? AND round = ?", key)
            insert_round(db, run_id, record)
            self._touch(db, run_id)

    def rounds(self, run_id: str, phase: str | None = None) -> list[RoundRecord]:
        """The recorded phases and rounds of a run, or those of one phase, in the order in which they happen."""
        with self._guarded("the rounds cannot be read"), self._snapshot() as db:
            return read_rounds(db, run_id, phase)

    def last_state(self, run_id: str) -> StoredState | None:
        """The newest recorded global state, its files checked against their hashes; None if there is none yet.

        Raises:
            CheckpointError: A file is missing or was changed.
        """
        query = (
            "SELECT phase, round FROM rounds JOIN files USING (run_id) "
            "WHERE run_id = ? AND name = printf('%s-%04d', phase, round)"
        )
        with self._guarded("the state cannot be read"), self._snapshot() as db:
            found = db.execute(query, (run_id,)).fetchall()
        if not found:
            return None
        return self.state(run_id, *max(found, key=lambda row: (PHASES.index(row[0]), row[1])))

    def state(self, run_id: str, phase: str, number: int) -> StoredState:
        """The global state that was recorded with a round, its files checked against their hashes.

        Raises:
            CheckpointError: There is none, or a file is missing or was changed.
        """
        name = _state_name(phase, number)
        loaded = self._load(run_id, [name, f"{name}.extra"])
        if name not in loaded:
            raise CheckpointError(
                f"run {run_id} keeps no state of {phase} {number}", cause="no such round was recorded"
            )
        return StoredState(phase, number, loaded[name], loaded.get(f"{name}.extra", {}))

    # -- blobs ---------------------------------------------------------------------------------------------------------

    def save_blob(self, run_id: str, name: str, arrays: Arrays) -> None:
        """Keep named arrays with the run, e.g. the aggregated sketches; a blob of the same name is replaced.

        Raises:
            StoreError: The name is not made of letters, digits and `_ -`, or the store cannot be written.
        """
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name) or re.fullmatch(rf"({'|'.join(PHASES)})-\d+", name):
            raise StoreError(
                "a blob cannot have this name",
                got=repr(name),
                expected="letters, digits, '_' and '-', not a phase with a number",
            )
        with self._guarded(f"the blob {name} cannot be written"), self._replacing(run_id, {name: arrays}):
            pass

    def load_blob(self, run_id: str, name: str) -> Arrays:
        """The arrays kept under `name`.

        Raises:
            CheckpointError: There is no such blob, or its file is missing or was changed.
        """
        loaded = self._load(run_id, [name])
        if name not in loaded:
            raise CheckpointError(f"run {run_id} keeps no blob '{name}'", cause="the run stopped before it was made")
        return loaded[name]

    # -- the lock ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self, run_id: str) -> Iterator[None]:
        """Hold the right to advance the run; the system frees it when the process ends, however it ends.

        Raises:
            StoreError: Another process advances the run.
        """
        with contextlib.ExitStack() as stack:
            with self._guarded("the run cannot be locked"):
                handle = stack.enter_context(open(self.run_folder(run_id) / "lock", "a+", encoding="ascii"))
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    handle.seek(0)
                    raise StoreError(
                        f"another process advances run {run_id}",
                        got=f"pid {handle.read().strip() or 'unknown'}",
                        remedy="wait for that process, or end it",
                    ) from None
                handle.truncate(0)
                handle.write(str(os.getpid()))
                handle.flush()
            yield

    # -- files ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _replacing(self, run_id: str, files: Mapping[str, Arrays | None]) -> Iterator[sqlite3.Connection]:
        """A transaction that also replaces the run's `files`; None removes one. All of it happens, or nothing."""
        with self._snapshot() as db:
            old = {name: row[0] for name in files if (row := file_row(db, run_id, name)) is not None}
        new: list[tuple[str, str, str, str, str]] = []
        for name, arrays in files.items():
            if arrays is not None:
                path = f"{name}.safetensors" if old.get(name) != f"{name}.safetensors" else f"{name}.again.safetensors"
                content = serialise(arrays)
                write_atomically(self.run_folder(run_id) / path, content)
                new.append((run_id, name, path, hashlib.sha256(content).hexdigest(), json.dumps(list(arrays))))
        with self._transaction() as db:
            self._touch(db, run_id)
            db.executemany("DELETE FROM files WHERE run_id = ? AND name = ?", [(run_id, name) for name in files])
            for file in new:
                insert(db, "files", file)
            yield db
        for path in old.values():
            with contextlib.suppress(OSError):  # nothing refers to it any more: it only takes up room
                (self.run_folder(run_id) / path).unlink()

    def _load(self, run_id: str, names: Sequence[str]) -> dict[str, Arrays]:
        """The arrays of those `names` that the database knows."""
        seen: dict[str, tuple[str, str, str]] = {}
        while True:
            with self._guarded("the files cannot be read"), self._snapshot() as db:
                rows = {name: row for name in names if (row := file_row(db, run_id, name)) is not None}
            try:
                return {name: self._read_file(run_id, *row) for name, row in rows.items()}
            except CheckpointError:
                if rows == seen:  # else a writer replaced the files between our look at the database and at the folder
                    raise
                seen = rows

    def _read_file(self, run_id: str, path: str, sha256: str, names: str) -> Arrays:
        arrays = read_arrays(self.run_folder(run_id) / path, sha256)
        return {name: arrays[name] for name in json.loads(names)}

    # -- the database --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                what,
                got=error,
                cause=f"the disk is full, or {self.root} cannot be written by this user",
                remedy="free some room, correct the rights, or choose another store with --store; "
                "what was recorded before is intact",
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self.root.mkdir(parents=True, exist_ok=True)
        with connected(self.database) as db, begun(db, "IMMEDIATE"):
            yield db

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """One consistent view, whatever writers do meanwhile."""
        target = self.database if self.database.exists() else ":memory:"
        with connected(target) as db, begun(db, "DEFERRED"):
            yield db

    def _touch(self, db: sqlite3.Connection, run_id: str) -> None:
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        if db.execute("UPDATE runs SET updated = ? WHERE run_id = ?", (stamp, run_id)).rowcount != 1:
            raise StoreError(f"there is no run '{run_id}'", remedy="create the run first")


def _state_name(phase: str, number: int) -> str:
    return f"{phase}-{number:04d}"
