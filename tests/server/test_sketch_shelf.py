"""Sketches that are put away come back as they were, from memory or from a file that leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from giva_core.errors import StoreError
from giva_core.types import QuantisedSketch
from server import sketch_shelf
from server.sketch_shelf import SketchShelf, sketch_bytes

SHAPES = {"low": (11, 3), "top": (7, 2)}
SMALL = sketch_bytes(SHAPES, 16)


def sketches(seed: int, code: str = "i2") -> dict[str, QuantisedSketch]:
    rng = np.random.default_rng(seed)
    most = np.iinfo(code).max
    return {
        name: QuantisedSketch(
            rng.integers(-most, most, shape).astype(code), rng.integers(-200, 128, shape[1]).astype(np.int32)
        )
        for name, shape in SHAPES.items()
    }


def assert_same(found: QuantisedSketch, wanted: QuantisedSketch) -> None:
    assert found.codes.dtype == wanted.codes.dtype and found.exponents.dtype == wanted.exponents.dtype
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.exponents, wanted.exponents)


@pytest.mark.parametrize("kept", [0, 1, 2, 9])
def test_what_is_put_comes_back_in_any_order_whatever_its_type(tmp_path: Path, kept: int) -> None:
    put = {f"site-{seed}": sketches(seed, code) for seed, code in enumerate(["i2", "i1", "i4", ">i2", "i2"])}
    with SketchShelf(tmp_path, SHAPES, kept * SMALL) as shelf:
        for site, of in put.items():
            shelf.put(site, of)
        for layer in ("top", "low"):
            for site in reversed(put):
                assert_same(shelf.layer(site, layer), put[site][layer])
        assert (shelf.written_bytes == 0) == (kept == 9)


def test_the_file_takes_as_many_bytes_as_was_said(tmp_path: Path) -> None:
    with SketchShelf(tmp_path, SHAPES, 0) as shelf:
        shelf.put("a", sketches(0))
        assert shelf.written_bytes == SMALL == 2 * (11 * 3 + 7 * 2) + 4 * (3 + 2)
        shelf.put("b", sketches(1, "i4"))
        assert shelf.written_bytes == SMALL + sketch_bytes(SHAPES, 32)


def test_nobody_finds_the_file_not_even_while_it_is_in_use(tmp_path: Path) -> None:
    with SketchShelf(tmp_path, SHAPES, 0) as shelf:
        shelf.put("a", sketches(0))
        assert list(tmp_path.iterdir()) == []
        assert shelf._file is not None and os.fstat(shelf._file.fileno()).st_nlink == 0
    assert shelf._file.closed


def test_a_disk_that_takes_and_gives_a_few_bytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, array: np.ndarray) -> int:
            return self.file.write(array[:5])

        def readinto(self, array: np.ndarray) -> int:
            return self.file.readinto(array[:7])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    make = sketch_shelf.tempfile.TemporaryFile
    monkeypatch.setattr(sketch_shelf.tempfile, "TemporaryFile", lambda **options: Slow(make(**options)))
    wanted = sketches(0)
    with SketchShelf(tmp_path, SHAPES, 0) as shelf:
        shelf.put("a", wanted)
        assert_same(shelf.layer("a", "top"), wanted["top"])


def test_a_file_that_lost_its_end_is_an_error(tmp_path: Path) -> None:
    with SketchShelf(tmp_path, SHAPES, 0) as shelf:
        shelf.put("a", sketches(0))
        assert shelf._file is not None
        shelf._file.truncate(SMALL - 1)
        assert_same(shelf.layer("a", "low"), sketches(0)["low"])
        with pytest.raises(StoreError, match="shorter than what was written"):
            shelf.layer("a", "top")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with SketchShelf(tmp_path / "gone", SHAPES, 0) as shelf, pytest.raises(StoreError, match="cannot be stored"):
        shelf.put("a", sketches(0))


def test_the_disk_is_asked_before_the_sites_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 3 * SMALL})()
    monkeypatch.setattr(sketch_shelf.shutil, "disk_usage", lambda folder: usage)
    shelf = SketchShelf(tmp_path, SHAPES, 2 * SMALL)
    shelf.check_room(5, 16)
    with pytest.raises(StoreError, match=f"sketches of 6 sites.*{3 * SMALL} free bytes.*expected {4 * SMALL} until"):
        shelf.check_room(6, 16)
    shelf.check_room(6, 8)
