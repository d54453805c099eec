"""What rounding took from updates is kept by round, so that rounds can come again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.feedback import Feedback


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIVA_HOME", str(tmp_path))
    return tmp_path


def of(number: int, *, run: str = "run", site: str = "site-1", head: bool = False) -> Feedback:
    return Feedback.of(run, site, number, head)


def lost(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full((2, 3), value, np.float32)}


def test_a_round_finds_what_the_rounds_before_it_lost() -> None:
    assert of(1).before() == {}
    of(1, head=True).keep(lost(0.5))
    assert of(1).before()["w"][0, 0] == 0.5  # head rounds come before training rounds
    of(1).keep(lost(1.0))
    of(4).keep(lost(4.0))
    assert of(3).before()["w"][0, 0] == 1.0
    assert of(9).before()["w"][0, 0] == 4.0
    assert of(1, head=True).before() == {}


def test_a_round_that_comes_again_finds_what_it_found_and_later_ones_are_forgotten() -> None:
    for number in (1, 2, 3):
        of(number).keep(lost(number))
    assert of(2).before()["w"][0, 0] == 1.0
    of(2).keep(lost(20.0))
    assert of(9).before()["w"][0, 0] == 20.0


def test_runs_and_sites_are_apart_and_names_are_no_paths(home: Path) -> None:
    of(1, run="../../outside").keep(lost(1.0))
    assert of(2).before() == {} and of(2, run="../../outside", site="site-2").before() == {}
    assert [path.name for path in home.iterdir()] == ["cache"]


def test_old_rounds_and_runs_go_and_a_damaged_file_counts_as_none(home: Path) -> None:
    for number in range(1, 7):
        of(number).keep(lost(number))
    files = sorted((home / "cache" / "feedback").rglob("*.safetensors"))
    assert len(files) == 3
    files[-1].write_bytes(b"no safetensors")
    assert of(7).before() == {}
    for number in range(10):
        of(1, run=f"run-{number}").keep(lost(1.0))
    assert len(list((home / "cache" / "feedback").iterdir())) == 8


def test_a_run_at_work_is_not_forgotten_for_younger_ones() -> None:
    for number in range(1, 21):
        of(number, run="old").keep(lost(float(number)))
        of(1, run=f"young {number}").keep(lost(0.0))
    assert of(21, run="old").before()["w"][0, 0] == 20.0
