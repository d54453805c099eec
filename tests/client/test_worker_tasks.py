"""Tasks in a child that can be killed: order, limits, a child that dies. The child is a stand-in that does as told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from client.worker_tasks import BusyError, ChildError, LimitError, Limits, Task, TaskRunner
from giva_core.errors import public_reason

ROOT = Path(__file__).parents[2]

#: What it is asked is what it does; `open` waits until somebody opens a named pipe.
_CHILD = """
import json, os, sys
from client.frames import *
questions, replies = os.fdopen(0, "rb"), os.fdopen(1, "wb")
loads, kept = 0, []
while True:
    try:
        words = read_frame(questions)[1].decode().split()
    except EOFError:
        break
    match words:
        case ["load"]:
            loads += 1
        case ["open", path]:
            write_frame(replies, PROGRESS, json.dumps({"step": 2, "steps": 9, "loads": loads}).encode())
            open(path).read()
        case ["hang"]:
            os.read(os.pipe()[0], 1)
        case ["grow"]:
            while True:
                kept.append(bytearray(os.urandom(1 << 20) * 16))
        case ["die"]:
            os._exit(7)
        case ["lie"]:  # a frame longer than any memory
            replies.write(b"A" + (1 << 62).to_bytes(8, "little"))
            replies.flush()
            os.read(os.pipe()[0], 1)
        case ["babble"]:
            write_frame(replies, PROGRESS, b"[]")
            os.read(os.pipe()[0], 1)
        case ["refuse"]:
            write_frame(replies, REFUSAL, b"no")
            continue
    write_frame(replies, PROGRESS, json.dumps({"step": 0, "steps": 0, "loads": loads}).encode())
    write_frame(replies, ANSWER, f"{os.getpid()} {' '.join(words)}".encode())
"""

Start = Callable[..., TaskRunner]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runners: list[TaskRunner] = []

    def make(command: list[str] | None = None, **limits: float) -> TaskRunner:
        given = Limits(**{"seconds": 60.0, **limits})  # type: ignore[arg-type]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        runner = TaskRunner(tmp_path, given, environment, command or [sys.executable, "-c", _CHILD])
        runners.append(runner)
        runner.start()
        return runner

    yield make
    for runner in runners:
        runner.stop()


def submit(runner: TaskRunner, words: str, is_wanted: Callable[[], bool] = lambda: True) -> Future[bytes]:
    return runner.submit(Task(words.encode(), "train.round", "1", 3, is_wanted))


def ask(runner: TaskRunner, words: str) -> tuple[int, str]:
    """The child that answered, and its answer."""
    pid, _, text = submit(runner, words).result(60).decode().partition(" ")
    return int(pid), text


def test_one_child_answers_in_order(start: Start) -> None:
    runner = start(queue=20)
    futures = [submit(runner, f"word {number}") for number in range(10)]
    answers = [future.result(60).decode().partition(" ") for future in futures]
    assert [text for _, _, text in answers] == [f"word {number}" for number in range(10)]
    assert len({pid for pid, _, _ in answers}) == 1
    progress = runner.progress()
    assert (progress.done, progress.refused, progress.killed, progress.task) == (10, 0, 0, None)
    assert runner.memory_bytes() > 1 << 20


def test_large_requests_and_refusals_pass(start: Start) -> None:
    runner = start()
    text = "x" * (1 << 22)
    assert ask(runner, text)[1] == text
    assert submit(runner, "refuse").result(60) == b"no"
    assert (runner.progress().done, runner.progress().refused) == (1, 1)


def test_a_hung_task_is_killed_and_the_next_one_works(start: Start) -> None:
    runner = start(seconds=0.5)
    before, _ = ask(runner, "load")
    hung, waiting = submit(runner, "hang"), submit(runner, "load")
    with pytest.raises(LimitError) as caught:
        hung.result(60)
    assert public_reason(caught.value) == "limit: the site's task-seconds"
    after, text = waiting.result(60).decode().split()
    assert int(after) != before and text == "load"
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    progress = runner.progress()
    assert (progress.done, progress.killed, progress.model_loads) == (2, 1, 2)


def test_a_task_that_grows_is_killed(start: Start) -> None:
    runner = start(memory_bytes=200 << 20)
    with pytest.raises(LimitError) as caught:
        submit(runner, "grow").result(60)
    assert public_reason(caught.value) == "limit: the site's memory-gib"
    assert ask(runner, "word")[1] == "word"


def test_a_child_that_dies_costs_its_task_alone(start: Start) -> None:
    runner = start()
    with pytest.raises(ChildError) as caught:
        submit(runner, "die").result(60)
    assert public_reason(caught.value) == "internal: the site's worker process ended"
    assert ask(runner, "word")[1] == "word"


@pytest.mark.parametrize("words", ["lie", "babble"])
def test_a_child_that_cannot_be_understood_is_killed(start: Start, words: str) -> None:
    runner = start(queue=0)
    before, _ = ask(runner, "word")
    with pytest.raises(ChildError) as caught:
        submit(runner, words).result(60)
    assert public_reason(caught.value) == "internal: the site's worker process ended"
    after, text = ask(runner, "word")
    assert after != before and text == "word"
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert (runner.progress().killed, runner.progress().done) == (1, 2)


def test_a_child_that_cannot_start_is_told_by_every_task(start: Start) -> None:
    runner = start(["/no/such/program"])
    for _ in range(2):
        with pytest.raises(ChildError):
            submit(runner, "word").result(60)
    assert ask(start(), "word")[1] == "word"


def test_the_queue_is_bounded_and_progress_is_visible(start: Start, tmp_path: Path) -> None:
    door = tmp_path / "door"
    os.mkfifo(door)
    runner = start(queue=2)
    running = submit(runner, f"open {door}")
    unwanted, waiting = submit(runner, "word", lambda: False), submit(runner, "word")
    with pytest.raises(BusyError) as caught:
        submit(runner, "word")
    assert public_reason(caught.value) == "busy: the site's queue is full"
    with door.open("w"):  # opens when the child does, which is after its word on progress is on the way
        assert not running.done() and runner.progress().task is not None
        assert runner.progress().task.kind == "train.round" and runner.progress().task.round == 3
    assert running.result(60).endswith(b"door") and waiting.result(60).endswith(b"word")
    assert unwanted.cancelled() and runner.waiting == 0
    assert runner.progress().done == 2
    assert ask(runner, "word")[1] == "word"  # every place is free again


def test_stopping_ends_the_child_and_leaves_waiting_tasks_unanswered(start: Start) -> None:
    runner = start(queue=3)
    child, _ = ask(runner, "word")
    futures = [submit(runner, "hang"), submit(runner, "word")]
    runner.stop()
    assert futures[1].cancelled()
    assert futures[0].cancelled() or isinstance(futures[0].exception(0), ChildError)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
