"""Vision models and what they see: sizes, heads, settings."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import torch
import transformers
from image_models import VISION, picture, write_vision
from PIL import Image

from giva_core.config import RunConfig
from giva_core.errors import ConfigError, DataError, public_reason
from giva_core.models import load_task_model
from giva_core.models.pixels import PixelReader
from giva_core.rows import ImageRow

HEADS = {"vit": ("classifier",), "dinov2": ("classifier",), "clip": ("classifier",)}


def config_for(folder, **task) -> RunConfig:
    labels = {"labels": ["above", "below"], **task}
    return RunConfig.from_nested({"model": {"path": str(folder)}, "task": {"kind": "image-classification", **labels}})


def rows(count: int = 3) -> list[ImageRow]:
    rng = random.Random(0)
    return [ImageRow(picture(("above", "below")[index % 2], rng)) for index in range(count)]


@pytest.mark.parametrize("kind", list(VISION))
def test_architectures_load_and_save_and_load_back(tmp_path, capfd, kind):
    folder = write_vision(tmp_path / "model", kind)
    capfd.readouterr()
    task = load_task_model(config_for(folder))
    assert task.head_modules == HEADS[kind] and task.num_outputs == 2
    assert not any("classifier" in name or "text" in name for name in task.frozen)
    encoded = task.encode_rows(rows(), 1)
    assert all(item["pixels"].shape == (3, 16, 16) and item["pixels"].dtype == np.uint8 for item in encoded)
    batch = task.collate(encoded, [0, 1, 0])
    with torch.no_grad():
        logits = task.forward(batch)
    assert logits.shape == (3, 2) and logits.abs().max() > 0
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"])
    torch.testing.assert_close(task.task_loss(logits, batch["labels"]), expected)
    torch.testing.assert_close(task.task_loss(logits, batch["labels"], "sum"), 3 * expected)
    task.save(tmp_path / "saved")
    again = load_task_model(config_for(tmp_path / "saved"))
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(again.forward(batch), logits, rtol=0, atol=0)
    assert again.weights_digest() == task.weights_digest()
    other = load_task_model(config_for(write_vision(tmp_path / "other", kind, seed=1)))
    assert other.weights_digest() != task.weights_digest()


def test_heads_start_equal_and_half_precision_works(tmp_path):
    folder = write_vision(tmp_path)
    torch.manual_seed(3)
    first = load_task_model(config_for(folder))
    second = load_task_model(config_for(folder).replace(model__dtype="bfloat16"))
    assert second.model.classifier.weight.dtype == torch.float32
    torch.testing.assert_close(second.model.classifier.weight, first.model.classifier.weight, rtol=1e-2, atol=1e-3)
    batch = first.collate(first.encode_rows(rows(), 1))
    with torch.no_grad():
        torch.testing.assert_close(second.forward(batch), first.forward(batch), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_images_become_what_transformers_makes_of_them(tmp_path, kind):
    name = {"vit": "ViTImageProcessorPil", "clip": "CLIPImageProcessorPil"}[kind]
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip("this transformers has no processor that works without torchvision")
    task = load_task_model(config_for(write_vision(tmp_path, kind)))
    theirs = cls.from_pretrained(tmp_path)
    for row in rows(4):
        image = Image.open(io.BytesIO(row.data)).convert("RGB")
        expected = np.asarray(theirs(image, return_tensors="np")["pixel_values"][0])
        found = task.collate(task.encode_rows([row], 1))["pixel_values"][0].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "size", "shape"),
    [
        ({"size": 16}, (40, 20), (16, 16)),
        ({"size": {"height": 12, "width": 8}}, (40, 20), (12, 8)),
        ({"size": 16, "do_center_crop": True, "crop_size": 12}, (40, 20), (12, 12)),
        ({"size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": 12}, (40, 20), (12, 12)),
        ({"do_resize": False, "do_center_crop": True, "crop_size": {"height": 30, "width": 50}}, (40, 20), (30, 50)),
    ],
)
def test_sizes(settings, size, shape):
    reader = PixelReader.from_settings(settings)
    stream = io.BytesIO()
    Image.new("L", size, 200).save(stream, "PNG")
    found = reader.read(stream.getvalue())
    assert reader.shape == shape and found.shape == (3, *shape)
    assert set(np.unique(found)) <= {0, 200} and found[0, shape[0] // 2, shape[1] // 2] == 200
    assert reader.normalised(found[None])[0, 0].max() == pytest.approx((200 / 255 - 0.5) / 0.5)


def test_a_model_takes_images_of_another_size_than_it_was_made_for(tmp_path):
    folder = write_vision(tmp_path)
    settings = {"size": {"height": 24, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    task = load_task_model(config_for(folder))
    assert task.forward(task.collate(task.encode_rows(rows(), 1))).shape == (3, 2)


def test_unusable_images_are_counted_and_not_shown(tmp_path, monkeypatch):
    task = load_task_model(config_for(write_vision(tmp_path)))
    with pytest.raises(DataError, match=r"got 2 of 4, the first being number 3;.* 8 bits") as caught:
        task.encode_rows([*rows(2), ImageRow(b"SECRET"), ImageRow(rows(1)[0].data[:200])], 1)
    assert "SECRET" not in str(caught.value) and "2" not in public_reason(caught.value)
    monkeypatch.setattr("giva_core.models.pixels._MOST_PIXELS", 100)
    with pytest.raises(DataError, match="1 of 1"):
        task.encode_rows(rows(1), 1)


def test_models_that_do_not_say_how_to_look_are_refused(tmp_path):
    folder = write_vision(tmp_path)
    path = folder / "preprocessor_config.json"
    for content, message in (
        ("{", "does not say"),
        ("{}", "no fixed size"),
        ('{"size": {"longest": 3}}', "another form"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_task_model(config_for(folder))
    path.unlink()
    with pytest.raises(ConfigError, match="does not say how images become numbers"):
        load_task_model(config_for(folder))
    with pytest.raises(ConfigError, match="needs its labels"):
        load_task_model(config_for(folder, labels=[]))


@pytest.mark.parametrize(
    ("mode", "size", "form"),
    [("L", (1, 60_000), "PNG"), ("I;16", (20, 20), "PNG"), ("F", (20, 20), "TIFF"), ("RGB", (20, 20), "PPM")],
)
def test_images_that_would_fill_memory_or_turn_white_are_refused(mode, size, form):
    reader = PixelReader.from_settings({"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224})
    stream = io.BytesIO()
    Image.new(mode, size, 7).save(stream, form)
    with pytest.raises(DataError, match="an image cannot be read"):
        reader.read(stream.getvalue())
