"""What was asked in a run, on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from client.questions import Questions, question_digest
from giva_core.errors import ProtocolError
from giva_core.protocol import Payload


def test_the_same_question_counts_once_also_after_a_restart(tmp_path: Path) -> None:
    assert Questions(tmp_path / "q", "7").with_one_more("left", "a") == 1
    Questions(tmp_path / "q", "7").remember("left", "a")
    again = Questions(tmp_path / "q", "7")
    assert again.with_one_more("left", "a") == 1
    assert again.with_one_more("left", "b") == 2
    assert again.with_one_more("right", "b") == 1
    assert Questions(tmp_path / "q", "8").with_one_more("left", "b") == 1
    again.remember("left", "a")
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["7.json"]


@pytest.mark.parametrize("run", ["", "../1", "1/2", "-1", "1" * 21, "a", "1\n"])
def test_a_run_s_id_is_no_path(tmp_path: Path, run: str) -> None:
    with pytest.raises(ProtocolError, match="no id of a run"):
        Questions(tmp_path, run)


def test_the_newest_runs_stay(tmp_path: Path) -> None:
    for number in range(256):
        path = tmp_path / f"{number}.json"
        path.write_text("{}", encoding="utf-8")
        os.utime(path, (1000 + number, 1000 + number))
    Questions(tmp_path, "999").remember("train", "a")
    assert len(list(tmp_path.iterdir())) == 256
    assert not (tmp_path / "0.json").exists() and (tmp_path / "1.json").exists() and (tmp_path / "999.json").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    Questions(tmp_path, "7").remember("left", "a")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            Questions(tmp_path, "7").remember("left", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["7.json"]
    assert Questions(tmp_path, "7").with_one_more("left", "a") == 1


def test_a_question_is_its_values_and_its_arrays() -> None:
    base = Payload({"codes": np.arange(4, dtype=np.int16)}, {"stage": "left"})
    others = [
        Payload({"codes": np.arange(4, dtype=np.int16)}, {"stage": "right"}),
        Payload({"codes": np.arange(4, dtype=np.int32)}, {"stage": "left"}),
        Payload({"codes": np.arange(4, dtype=np.int16).reshape(2, 2)}, {"stage": "left"}),
        Payload({"codes": np.array([0, 1, 2, 4], np.int16)}, {"stage": "left"}),
        Payload({"more": np.arange(4, dtype=np.int16)}, {"stage": "left"}),
    ]
    digests = {question_digest("k", payload) for payload in [base, *others]} | {question_digest("other", base)}
    assert len(digests) == 7
    again = Payload({"codes": np.arange(4, dtype=np.int16)}, {"stage": "left"})
    assert question_digest("k", again) == question_digest("k", base)
