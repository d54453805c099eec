"""Sites whose examples are images, in folders and in Parquet files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_models import VISION, picture, write_pictures, write_vision

from client.alone import site_at, train_alone
from client.data import read_rows
from client.file_formats import FoundRow, open_rows
from client.policy import Policy, PolicyError
from client.site import SiteSettings
from client.trainer import LocalTrainer, _state_of
from giva_core.config import DataConfig, RunConfig, TaskConfig
from giva_core.errors import DataError, public_reason
from giva_core.models.pixels import PixelReader
from giva_core.rows import ImageRow
from server.run_store import RunStore
from server.simulate import simulate

TASK = TaskConfig(kind="image-classification", labels=("above", "below"))


def looking(model: Path, folder: Path, **settings: object) -> RunConfig:
    config = RunConfig.from_nested(
        {
            "model": {"path": str(model)},
            "task": {"kind": "image-classification", "labels": ["above", "below"], "share-counts": True},
            "giva": {"rank": 2, "calibration-batch-size": 16},
            "train": {"learning-rate": 0.03, "head-learning-rate": 0.01, "batch-size": 4, "local-epochs": 2},
            "rounds": {"num-rounds": 2, "head-rounds": 1, "min-sites": 2, "join-seconds": 1.0},
            "data": {"folder": str(folder), "train-file": "train", "eval-file": "test"},
        }
    )
    return config.replace(**settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number, count in enumerate((20, 28), start=1):
        write_pictures(root / f"site-{number}" / "train", count, number)
        write_pictures(root / f"site-{number}" / "test", 8 + number, 10 + number)
    return root


@pytest.mark.parametrize("kind", list(VISION))
def test_every_architecture_learns_on_one_machine(tmp_path: Path, folder: Path, kind: str) -> None:
    config = looking(write_vision(tmp_path, kind), folder, train__gradient_checkpointing=True)
    if kind == "clip":  # with two labels the gradient of its last layer has rank 1
        config = config.replace(giva__target_modules='["q_proj", "v_proj", "out_proj", "fc1"]')
    rounds = train_alone(config, site_at(folder / "site-2", config)).rounds
    first, last = rounds[0].evaluation, rounds[-1].evaluation
    assert first and last and last.loss < first.loss and last.metrics.keys() == {"accuracy", "macro_f1", "mcc"}


def test_a_federation_of_images(tmp_path: Path, folder: Path, store: RunStore) -> None:
    run_id = simulate(looking(write_vision(tmp_path), folder), store)
    last = store.rounds(run_id, "train")[-1]
    assert store.run(run_id).status == "completed" and last.total_examples == 48
    assert {"accuracy", "macro_f1", "mcc", "worst_accuracy"} == set(last.metrics)
    assert last.metrics["accuracy"] > 0.8


def test_folders_and_parquet_hold_the_same(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_pictures(tmp_path / "train", 6)
    (tmp_path / "train" / "above" / ".hidden").write_text("no image")
    examples = read_rows(tmp_path / "train", TASK, DataConfig())
    assert examples.labels.tolist() == [0, 0, 0, 1, 1, 1] and examples.labels.dtype == np.int64
    data = [row.data for row in examples.rows if isinstance(row, ImageRow)]
    assert data[0].startswith(b"\x89PNG") and repr(examples.rows[0]) == "ImageRow(...)"
    names = ["above"] * 3 + ["below"] * 3
    plain, nested = tmp_path / "plain.parquet", tmp_path / "nested.parquet"
    parquet.write_table(pyarrow.table({"image": data, "label": names}), plain)
    structs = [{"bytes": item, "path": None} for item in data]
    parquet.write_table(pyarrow.table({"image": structs, "label": names}), nested)
    for path in (plain, nested):
        found = read_rows(path, TASK, DataConfig())
        assert found.rows == examples.rows and found.labels.tolist() == examples.labels.tolist()


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_each_image_is_resized_before_the_next_is_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    place = folder / "site-1"
    config = looking(write_vision(tmp_path / "model"), folder, data__eval_file="")
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [(file.read_bytes(), file.parent.name) for file in sorted((place / "train").glob("*/*.png"))]
        images, labels = zip(*rows, strict=True)
        place, config = tmp_path / "site", config.replace(data__train_file="rows.parquet")
        place.mkdir()
        parquet.write_table(pyarrow.table({"image": images, "label": labels}), place / "rows.parquet")
    done: list[str] = []

    def reading(*arguments: Any) -> Iterator[FoundRow]:
        for found in open_rows(*arguments):
            done.append("read")
            yield found

    def resizing(self: PixelReader, data: bytes) -> np.ndarray:
        done.append("resized")
        return resize(self, data)

    resize = PixelReader.read
    monkeypatch.setattr("client.data.open_rows", reading)
    monkeypatch.setattr(PixelReader, "read", resizing)
    LocalTrainer(site_at(place, config), config)
    assert done == ["read", "resized"] * 20


def test_what_is_wrong_with_images_is_told_without_them(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "SECRET", 4)
    (folder / "above" / "SECRET.txt").write_text("SECRET")
    (folder / "Zebra").mkdir()
    (folder / "Zebra" / "1.png").write_bytes(picture("above", random.Random(0)))
    with pytest.raises(DataError, match="1 not an image") as caught:
        read_rows(folder, TASK, DataConfig())
    assert "label unknown" in str(caught.value) and "Zebra" not in str(caught.value)
    assert public_reason(caught.value).endswith("unusable rows (label unknown, not an image)")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "SECRET", "label": "above"}\n{"label": "above"}\n')
    with pytest.raises(DataError, match="image not the bytes of a file") as caught:
        read_rows(rows, TASK, DataConfig())
    assert "SECRET" not in str(caught.value)
    with pytest.raises(DataError, match="no known format"):
        read_rows(folder, TaskConfig(labels=("a", "b")), DataConfig())
    with pytest.raises(DataError, match="there is no data file"):
        read_rows(tmp_path / "none", TASK, DataConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no examples"):
        read_rows(tmp_path / "empty", TASK, DataConfig())


def test_a_changed_folder_is_read_anew(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "train", 4)
    before = _state_of(folder)
    assert _state_of(folder) == before
    (folder / "below" / "001.png").unlink()
    assert _state_of(folder) != before


def test_images_count_as_one_term_of_the_gradient_each(tmp_path: Path, folder: Path) -> None:
    config = looking(write_vision(tmp_path), folder, giva__oversampling=0, giva__power_passes=0)
    LocalTrainer(SiteSettings("site-1", folder / "site-1", config.data, "cpu", Policy()), config)
    clip = looking(write_vision(tmp_path / "clip", "clip"), folder, giva__oversampling=0, giva__rank=1)
    with pytest.raises(PolicyError, match="sketches as wide"):
        LocalTrainer(SiteSettings("site-1", folder / "site-1", clip.data, "cpu", Policy()), clip)
    wide = config.replace(giva__rank=5, giva__calibration_batch_size=9)
    with pytest.raises(PolicyError, match="sketches as wide"):
        LocalTrainer(SiteSettings("site-1", folder / "site-1", config.data, "cpu", Policy()), wide)
