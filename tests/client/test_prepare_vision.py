"""Pictures for a vision model: reading Debian's package, the split by classes, the small model."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client import archives as archives_module
from client import prepare_vision as module
from client.archives import deb_files, obtain
from client.data import read_rows
from client.prepare_vision import ADAPTED, CLASSES, PRETRAINED, prepare_vision, read_idx
from giva_core.config import DataConfig, RunConfig, TaskConfig
from giva_core.errors import ConfigError, DataError
from giva_core.models import load_task_model


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def deb(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": stream.getvalue()}
    made = b"!<arch>\n"
    for name, content in parts.items():
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        made += content + b"\n" * (len(content) % 2)
    return made


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package like Debian's, of 8 × 8 pictures whose brightness is their class."""
    rng = np.random.default_rng(0)
    files = {}
    for part, each in (("train", 70), ("t10k", 30)):
        labels = rng.permutation(np.repeat(np.arange(10), each))
        pixels = (labels[:, None, None] * 25 + rng.integers(0, 20, (len(labels), 8, 8))).astype(np.uint8)
        for content, what in zip((pixels, labels), module._FILES, strict=True):
            files[f"{module._FOLDER}{part}-{what}"] = idx(content)
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / module.IMAGES.filename).write_bytes(deb(files))
    digest = hashlib.sha256((folder / module.IMAGES.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(module, "IMAGES", replace(module.IMAGES, sha256=digest))
    monkeypatch.setattr(module, "PRETRAINING_IMAGES", 200)
    monkeypatch.setattr(module, "_OTHERS", {"validation": 40, "test": 100})
    return folder


def test_sites_hold_classes_that_the_model_has_never_seen(archives: Path, tmp_path: Path) -> None:
    told: list[str] = []
    done = prepare_vision(home=tmp_path, train_examples=200, archives=archives, progress=told.append)
    assert done.created and set(PRETRAINED) | set(ADAPTED) == set(CLASSES) and not set(PRETRAINED) & set(ADAPTED)
    assert json.loads((done.folder / "federation.json").read_text(encoding="utf-8")) == done.federation
    task = TaskConfig(kind="image-classification", labels=ADAPTED)
    for name, total in (("train", 200), ("validation", 40), ("test", 100)):
        pooled = read_rows(done.pooled / name, task, DataConfig())
        at_sites = [read_rows(site / name, task, DataConfig()) for site in sorted(done.sites.iterdir())]
        assert len(pooled) == sum(map(len, at_sites)) == total
        assert Counter(row.data for row in pooled.rows) == Counter(row.data for found in at_sites for row in found.rows)
        for site, found in zip(sorted(done.sites.iterdir()), at_sites, strict=True):
            counted = done.federation["sites"][site.name][name]
            assert counted["examples"] == len(found)
            assert list(counted["classes"].values()) == np.bincount(found.labels, minlength=5).tolist()
    train, validation = (read_rows(done.pooled / name, task, DataConfig()).rows for name in ("train", "validation"))
    assert not set(train) & set(validation)

    config = RunConfig.from_nested(
        {"model": {"path": str(done.model)}, "task": {"kind": "image-classification", "labels": list(ADAPTED)}}
    )
    model = load_task_model(config)
    assert model.head_modules == ("classifier",) and model.processor.shape == (8, 8)
    assert float(told[-2].rpartition("accuracy of ")[2].split()[0]) > 0.5  # brightness is easy to tell
    again = prepare_vision(home=tmp_path, train_examples=200, archives=archives)
    assert not again.created and again.federation == json.loads(json.dumps(done.federation))


@pytest.mark.parametrize("wrong", [{"train_examples": 199}, {"seed": -1}])
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        prepare_vision(home=tmp_path, **wrong)  # type: ignore[arg-type]


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.deb"
    for content in (b"", b"!<arch>\n", b"not a package", deb({})[:200]):
        path.write_bytes(content)
        with pytest.raises(DataError):
            deb_files(path, ("a",))
    path.write_bytes(deb({"./a": b"x", "./b": b"y"}))
    assert deb_files(path, ("./b",)) == {"./b": b"y"}
    for raw in (b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\0", b""):
        with pytest.raises(DataError, match="IDX"):
            read_idx(gzip.compress(raw))


def test_without_apt_the_way_round_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives_module, "which", lambda name: None)
    with pytest.raises(DataError, match=r"(?s)apt could not fetch.*--archives"):
        obtain(module.IMAGES, tmp_path / "cache", None, lambda message: None)
    with pytest.raises(DataError, match="apt-get download dataset-fashion-mnist="):
        obtain(module.IMAGES, tmp_path / "cache", tmp_path, lambda message: None)
