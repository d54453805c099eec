"""The tables of the run store, and how records become rows and rows become records."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from giva_core.config import RunConfig
from giva_core.errors import GivaError, StoreError
from giva_core.settings import Scalar
from giva_core.types import Arrays, RoundRecord, SiteRecord

_BUSY_SECONDS = 30.0
_RETRY_SECONDS = 0.01
SCHEMA_VERSION = 1
#: The phases of a run, in the order in which they happen.
PHASES = ("hello", "head", "calibrate", "bases", "train")
STATUSES = ("running", "completed", "failed", "stopped")

# The columns behind the key, in the tables' order; each is the field of that name in the record.
_ROUND_FIELDS = ("total_examples", "train_loss", "eval_loss", "aggregation_error", "bytes_up", "bytes_down", "seconds")
_SITE_FIELDS = (
    *("status", "reason", "num_examples", "num_steps", "train_loss", "train_seconds"),
    *("eval_examples", "eval_loss", "bytes_up", "bytes_down"),
)
_REALS = frozenset({"train_loss", "eval_loss", "aggregation_error", "seconds", "train_seconds"})
_SCHEMA = (
    """CREATE TABLE runs (
        run_id TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, engine TEXT NOT NULL,
        created TEXT NOT NULL, updated TEXT NOT NULL, settings TEXT NOT NULL, versions TEXT NOT NULL,
        facts TEXT NOT NULL)""",
    """CREATE TABLE rounds (
        run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE, phase TEXT NOT NULL, round INTEGER NOT NULL,
        total_examples INTEGER NOT NULL, train_loss REAL, eval_loss REAL, aggregation_error REAL,
        bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL, seconds REAL NOT NULL,
        PRIMARY KEY (run_id, phase, round))""",
    """CREATE TABLE sites (
        run_id TEXT NOT NULL, phase TEXT NOT NULL, round INTEGER NOT NULL, site TEXT NOT NULL,
        status TEXT NOT NULL, reason TEXT NOT NULL, num_examples INTEGER NOT NULL, num_steps INTEGER NOT NULL,
        train_loss REAL, train_seconds REAL NOT NULL, eval_examples INTEGER NOT NULL, eval_loss REAL,
        bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL, PRIMARY KEY (run_id, phase, round, site),
        FOREIGN KEY (run_id, phase, round) REFERENCES rounds ON DELETE CASCADE)""",
    # `site` is empty for the totals
    """CREATE TABLE metrics (
        run_id TEXT NOT NULL, phase TEXT NOT NULL, round INTEGER NOT NULL, site TEXT NOT NULL, name TEXT NOT NULL,
        value REAL, PRIMARY KEY (run_id, phase, round, site, name),
        FOREIGN KEY (run_id, phase, round) REFERENCES rounds ON DELETE CASCADE)""",
    # safetensors sorts its arrays; `arrays` keeps their order, for a resumed run must sum like an uninterrupted one
    """CREATE TABLE files (
        run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE, name TEXT NOT NULL, path TEXT NOT NULL,
        sha256 TEXT NOT NULL, arrays TEXT NOT NULL, PRIMARY KEY (run_id, name))""",
)


@dataclass(frozen=True)
class RunSummary:
    """One run at a glance.

    Attributes:
        run_id: Sortable by the time of creation.
        name: The name its configuration gives it; may be empty.
        status: `running`, `completed`, `failed` or `stopped`.
        reason: Why, for `failed` and `stopped`.
        engine: What drives it, e.g. `simulation`.
        created: UTC, ISO 8601.
        updated: UTC, ISO 8601.
        settings: The configuration as flat settings, as stored.
        versions: Version by package.
        facts: What was found out on the way, e.g. `bases_digest`.
        rounds_done: Training rounds recorded.
        train_loss: Of the newest head or training round that has one.
        eval_loss: Likewise.
        metrics: Likewise, totals by name.
        bytes_up: Bytes received from all sites in all phases.
        bytes_down: Bytes sent to all sites in all phases.
        seconds: Wall time of all phases.
    """

    run_id: str
    name: str
    status: str
    reason: str
    engine: str
    created: str
    updated: str
    settings: Mapping[str, Scalar]
    versions: Mapping[str, str]
    facts: Mapping[str, Scalar]
    rounds_done: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0

    @property
    def config(self) -> RunConfig:
        """The configuration; parsed on demand, so that a run of another version can still be listed.

        Raises:
            StoreError: This version does not know one of the settings.
        """
        try:
            return RunConfig.from_flat(self.settings)
        except GivaError as error:
            raise StoreError(
                f"the configuration of run {self.run_id} cannot be read by this version",
                got=error.what,
                remedy=f"use the version that made it: {self.versions.get('fedgiva', 'unknown')}",
            ) from error


@dataclass(frozen=True)
class StoredState:
    """The global state after a phase.

    Attributes:
        phase: `head` or `train`, or another phase that was recorded with arrays.
        round: The round within the phase, from 1.
        arrays: The global arrays by name, in the order in which they were recorded.
        extra: What the strategy keeps beside them; empty if nothing.
    """

    phase: str
    round: int
    arrays: Arrays
    extra: Arrays


@contextlib.contextmanager
def connected(target: Path | str) -> Iterator[sqlite3.Connection]:
    """A connection to the database at `target`, its tables made if need be.

    Raises:
        StoreError: It was written by a newer version.
    """
    with contextlib.closing(sqlite3.connect(target, timeout=_BUSY_SECONDS, isolation_level=None)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{target} was written by a newer version",
                got=f"schema {version}",
                expected=f"at most {SCHEMA_VERSION}",
                remedy="upgrade fedgiva, or choose another store with --store",
            )
        if version == 0:
            create_schema(db)
        yield db


@contextlib.contextmanager
def begun(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    """A transaction of the given kind: committed at the end, rolled back at an error."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def create_schema(db: sqlite3.Connection) -> None:
    """Make the tables of an empty database."""
    _write_ahead(db)
    with begun(db, "IMMEDIATE"):
        if db.execute("PRAGMA user_version").fetchone() == (0,):  # else another process was faster
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switch the file to write-ahead logging, in which readers and the writer do not block each other.

    The switch turns a read lock into a write lock, where SQLite does not wait for other connections as it does
    elsewhere, since two that do so would wait for each other: whoever meets another process here tries again.
    """
    give_up = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        else:
            return
        time.sleep(_RETRY_SECONDS)


def insert(db: sqlite3.Connection, table: str, row: Sequence[Any]) -> None:
    """Insert one whole row."""
    db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def insert_round(db: sqlite3.Connection, run_id: str, record: RoundRecord) -> None:
    """Insert a record with its sites and metrics."""
    key = (run_id, record.phase, record.round)
    insert(db, "rounds", (*key, *(_cell(record, name) for name in _ROUND_FIELDS)))
    for name, value in record.metrics.items():
        insert(db, "metrics", (*key, "", name, _real(value)))
    for site in record.sites:
        insert(db, "sites", (*key, site.site, *(_cell(site, name) for name in _SITE_FIELDS)))
        for name, value in site.metrics.items():
            insert(db, "metrics", (*key, site.site, name, _real(value)))


def read_rounds(db: sqlite3.Connection, run_id: str, phase: str | None) -> list[RoundRecord]:
    """The inverse of `insert_round`, for all phases or for one, in the order in which they happen."""
    where, values = ("run_id = ?", [run_id]) if phase is None else ("run_id = ? AND phase = ?", [run_id, phase])
    metrics: dict[tuple[str, int, str], dict[str, float]] = {}
    for _, *key, name, value in db.execute(f"SELECT * FROM metrics WHERE {where} ORDER BY rowid", values):
        metrics.setdefault(tuple(key), {})[name] = float(value)
    sites: dict[tuple[str, int], list[SiteRecord]] = {}
    for _, of_phase, number, site, *cells in db.execute(f"SELECT * FROM sites WHERE {where} ORDER BY site", values):
        measured = metrics.get((of_phase, number, site), {})
        record = SiteRecord(site, metrics=measured, **_fields(_SITE_FIELDS, cells))
        sites.setdefault((of_phase, number), []).append(record)
    records = []
    for _, of_phase, number, *cells in db.execute(f"SELECT * FROM rounds WHERE {where}", values):
        of_sites, measured = tuple(sites.get((of_phase, number), ())), metrics.get((of_phase, number, ""), {})
        records.append(RoundRecord(of_phase, number, of_sites, metrics=measured, **_fields(_ROUND_FIELDS, cells)))
    return sorted(records, key=lambda record: (PHASES.index(record.phase), record.round))


def read_summary(db: sqlite3.Connection, row: tuple[Any, ...]) -> RunSummary:
    """A row of `runs` with what its rounds add up to."""
    *head, settings, versions, facts = row
    run_id = head[:1]
    bytes_up, bytes_down, seconds, rounds_done = db.execute(
        "SELECT coalesce(sum(bytes_up), 0), coalesce(sum(bytes_down), 0), coalesce(sum(seconds), 0.0), "
        "count(*) FILTER (WHERE phase = 'train') FROM rounds WHERE run_id = ?",
        run_id,
    ).fetchone()
    newest = "run_id = ? AND phase IN ('head', 'train') ORDER BY phase DESC, round DESC LIMIT 1"
    losses = [
        db.execute(f"SELECT {name} FROM rounds WHERE {name} IS NOT NULL AND {newest}", run_id).fetchone()
        for name in ("train_loss", "eval_loss")
    ]
    last = db.execute(f"SELECT run_id, phase, round FROM metrics WHERE site = '' AND {newest}", run_id).fetchone()
    query = "SELECT name, value FROM metrics WHERE run_id = ? AND phase = ? AND round = ? AND site = '' ORDER BY rowid"
    metrics = {name: float(value) for name, value in db.execute(query, last)} if last else {}
    train_loss, eval_loss = (float(row[0]) if row else None for row in losses)
    decoded = [json.loads(text) for text in (settings, versions, facts)]
    values = [*head, *decoded, rounds_done, train_loss, eval_loss, metrics, bytes_up, bytes_down, seconds]
    return RunSummary(*values)


def file_row(db: sqlite3.Connection, run_id: str, name: str) -> tuple[str, str, str] | None:
    """Path, SHA-256 and array names of one of the run's files, if the database knows it."""
    return db.execute("SELECT path, sha256, arrays FROM files WHERE run_id = ? AND name = ?", (run_id, name)).fetchone()


def _cell(record: RoundRecord | SiteRecord, name: str) -> Any:
    value = getattr(record, name)
    if name in _REALS:
        return _real(value)
    return value if isinstance(value, str) else int(value)


def _real(value: float | None) -> float | str | None:
    """SQLite turns NaN into NULL, which would hide a diverged run; as text it survives, and `float` reads it back."""
    if value is None:
        return None
    return "nan" if math.isnan(value) else float(value)


def _fields(names: Sequence[str], cells: Sequence[Any]) -> dict[str, Any]:
    pairs = zip(names, cells, strict=True)
    return {name: float(cell) if name in _REALS and cell is not None else cell for name, cell in pairs}
