"""One task at a time, in a process that can be killed: the bounded queue, the limits, and what is told of them.

A thread of its own starts the child and speaks with it, since a child ends with the thread that started it. Another
watches time and memory: a child that is over a limit is killed, its task answered with the reason, and the next task
gets a new child.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from giva_core.errors import GivaError

from . import frames

WATCH_SECONDS = 0.1

log = logging.getLogger("giva.worker")


class LimitError(GivaError):
    """A task was stopped at one of the site's limits."""

    kind = "limit"


class BusyError(GivaError):
    """The queue is full."""

    kind = "busy"


class ChildError(GivaError):
    """The process that held the model is gone."""

    kind = "internal"


@dataclass(frozen=True)
class Task:
    """One question as the parent sees it.

    Attributes:
        request: The serialised request.
        kind: Kind of the message.
        run: Id of the run.
        round: The round, where the question has one.
        is_wanted: Whether somebody still waits for the answer.
    """

    request: bytes
    kind: str
    run: str
    round: int = 0
    is_wanted: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Limits:
    """What a task may use, and how many may wait.

    Attributes:
        seconds: Wall time.
        memory_bytes: Resident memory of the child; 0 for no limit.
        queue: Tasks that may wait beside the one in work.
    """

    seconds: float
    memory_bytes: int = 0
    queue: int = 4


@dataclass(frozen=True)
class Progress:
    """What the worker is doing and has done."""

    task: Task | None = None
    began: float = 0.0
    step: int = 0
    steps: int = 0
    done: int = 0
    refused: int = 0
    killed: int = 0
    model_loads: int = 0


@dataclass
class _Child:
    """A running child, and why it was killed."""

    process: subprocess.Popen[bytes]
    loads: int = 0
    verdict: LimitError | None = None
    deadline: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> BinaryIO:
        return cast(BinaryIO, self.process.stdin)

    @property
    def replies(self) -> BinaryIO:
        return cast(BinaryIO, self.process.stdout)

    def close(self) -> None:
        for stream in (self.questions, self.replies):
            with suppress(OSError):
                stream.close()


class TaskRunner:
    """Works off tasks in a child process.

    Args:
        site_file: The site file, which the child reads by itself.
        limits: Of every task.
        environment: The child's environment.
        command: What to start instead of the real child; for tests.
    """

    def __init__(
        self, site_file: Path, limits: Limits, environment: Mapping[str, str], command: list[str] | None = None
    ) -> None:
        self._limits = limits
        self._environment = dict(environment)
        self._command = command or [sys.executable, "-P", "-m", "client.worker_process", str(site_file)]
        self._waiting: queue.Queue[tuple[Task, Future[bytes]] | None] = queue.Queue()
        self._places = threading.BoundedSemaphore(limits.queue + 1)
        self._progress = Progress()
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._is_stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name="tasks", daemon=True),
            threading.Thread(target=self._watch, name="limits", daemon=True),
        ]

    def start(self) -> None:
        """Start the child, so that the first task finds it ready."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Kill the child and start no other; tasks in work or waiting get no answer."""
        self._is_stopping.set()
        self._waiting.put(None)
        if child := self._child:
            child.process.kill()
        for thread in self._threads:
            thread.join(timeout=5.0)
        if child := self._child:  # one that was just being started
            child.process.kill()
            child.process.wait()

    def submit(self, task: Task) -> Future[bytes]:
        """Put a task into the queue; its future gives the serialised reply, or a GivaError.

        Raises:
            BusyError: The queue is full.
        """
        if not self._places.acquire(blocking=False):
            raise queue_is_full()
        future: Future[bytes] = Future()
        self._waiting.put((task, future))
        return future

    def progress(self) -> Progress:
        """What it is doing now."""
        with self._lock:
            return self._progress

    def count_refused(self) -> None:
        """Count a question that was refused before it became a task."""
        self._tell(refused=self._progress.refused + 1)

    @property
    def waiting(self) -> int:
        """Tasks in the queue."""
        return self._waiting.qsize()

    def memory_bytes(self) -> int:
        """Resident memory of the child; 0 where it cannot be told."""
        child = self._child
        return _resident_bytes(child.process.pid) if child and child.process.poll() is None else 0

    # -- the thread that works ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._prepare_child()
        while (entry := self._waiting.get()) is not None:
            task, future = entry
            if self._is_stopping.is_set() or not task.is_wanted():
                self._places.release()
                future.cancel()
                continue
            try:
                kind, reply = self._work(task)
            except Exception as error:  # whatever it is, this thread goes on: nobody else works
                known = error if isinstance(error, GivaError) else _gone(type(error).__name__)
                self._close(future.set_exception, known, killed=self._progress.killed + 1)
            else:
                what = "done" if kind == frames.ANSWER else "refused"
                self._close(future.set_result, reply, **{what: getattr(self._progress, what) + 1})
            self._prepare_child()

    def _close(self, settle: Callable[[Any], None], outcome: object, **counted: int) -> None:
        self._tell(task=None, step=0, steps=0, **counted)
        self._places.release()
        settle(outcome)

    def _work(self, task: Task) -> tuple[bytes, bytes]:
        self._tell(task=task, began=time.monotonic())
        child = self._ready_child()
        with child.lock:
            child.deadline = time.monotonic() + self._limits.seconds
        try:
            frames.write_frame(child.questions, frames.QUESTION, task.request)
            while True:
                kind, content = frames.read_frame(child.replies)
                if kind != frames.PROGRESS:
                    return kind, content
                self._hear(child, json.loads(content))
        except Exception as error:  # the pipe's end, or a frame that cannot be read: what follows it cannot, either
            child.process.kill()
            code = child.process.wait()
            got = f"exit code {code}" if isinstance(error, EOFError | OSError) else type(error).__name__
            raise child.verdict or _gone(got) from None
        finally:
            with child.lock:
                child.deadline = None

    def _prepare_child(self) -> None:
        """Have a child ready for the next task; where that fails the task will tell."""
        if not self._is_stopping.is_set():
            with suppress(Exception):
                self._ready_child()

    def _ready_child(self) -> _Child:
        child = self._child
        if child is None or child.process.poll() is not None:
            if child is not None:
                child.close()
            try:
                process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment
                )
            except OSError as error:
                raise _gone(error.strerror) from None
            child = self._child = _Child(process)
        return child

    def _hear(self, child: _Child, told: Mapping[str, int]) -> None:
        new = told["loads"] - child.loads
        child.loads = told["loads"]
        self._tell(step=told["step"], steps=told["steps"], model_loads=self._progress.model_loads + new)

    def _tell(self, **changes: object) -> None:
        with self._lock:
            self._progress = replace(self._progress, **changes)  # type: ignore[arg-type]

    # -- the thread that watches --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._is_stopping.wait(WATCH_SECONDS):
            if child := self._child:
                with child.lock:
                    if child.deadline is not None and (verdict := self._verdict(child)):
                        child.verdict, child.deadline = verdict, None
                        child.process.kill()
                        log.warning("task killed: %s", verdict.public)

    def _verdict(self, child: _Child) -> LimitError | None:
        limits = self._limits
        if child.deadline is not None and time.monotonic() > child.deadline:
            return _limit("task-seconds", f"{limits.seconds:g} s")
        if limits.memory_bytes and (used := _resident_bytes(child.process.pid)) > limits.memory_bytes:
            return _limit("memory-gib", f"{used / 2**30:.2f} GiB")
        return None


def queue_is_full() -> BusyError:
    """The refusal of a question for which there is no place."""
    return BusyError("the worker's queue is full", public="the site's queue is full")


def _gone(got: object) -> ChildError:
    return ChildError(
        "the process that holds the model is gone",
        got=got,
        cause="it was killed, perhaps by the system for lack of memory",
        public="the site's worker process ended",
    )


def _limit(key: str, got: str) -> LimitError:
    return LimitError(
        "a task went over a limit of this site and was killed",
        got=got,
        cause="the task hung, or the run asks for more than this machine has",
        remedy=f"change the run, or raise worker.{key} in the site file",
        public=f"the site's {key}",
    )


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
