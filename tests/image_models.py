"""Tiny random vision models, one of each architecture, and pictures of two kinds: shapes only."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

_WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGE = {"image_size": 16, "patch_size": 4}
_EXACT = {"do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2}
_CROPPED = {"do_resize": True, "size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16, "resample": 3}


def _clip() -> Any:
    text = {**_WIDE, "vocab_size": 30, "max_position_embeddings": 8, "projection_dim": 8}
    return transformers.CLIPConfig(text_config=text, vision_config={**_WIDE, **_IMAGE, "projection_dim": 8})


#: Configuration, the class that the checkpoint is of, and its image settings.
VISION: dict[str, Any] = {
    "vit": (lambda: transformers.ViTConfig(**_WIDE, **_IMAGE, initializer_range=0.2), transformers.ViTModel, _EXACT),
    "dinov2": (
        lambda: transformers.Dinov2Config(**{**_WIDE, "mlp_ratio": 2}, **{**_IMAGE, "image_size": 24}),
        transformers.Dinov2Model,
        {**_CROPPED, "size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}},
    ),
    "clip": (_clip, transformers.CLIPModel, {**_CROPPED, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27] * 3}),
}


def write_vision(folder: Path, kind: str = "vit", seed: int = 0) -> Path:
    """A folder with a tiny vision model without a head."""
    settings, cls, image = VISION[kind]
    torch.manual_seed(seed)
    cls(settings()).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(image), encoding="utf-8")
    return folder


def picture(kind: str, rng: random.Random, file_format: str = "PNG") -> bytes:
    """A noisy picture, `bright` above or `bright` below."""
    width, height = rng.randint(18, 30), rng.randint(18, 30)
    image = Image.new("RGB", (width, height))
    for y in range(height):
        is_bright = (y < height // 2) == (kind == "above")
        for x in range(width):
            image.putpixel((x, y), tuple(rng.randint(140, 255) if is_bright else rng.randint(0, 110) for _ in range(3)))
    stream = io.BytesIO()
    image.save(stream, file_format)
    return stream.getvalue()


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of pictures, half of them of each kind."""
    rng = random.Random(seed)
    for number in range(count):
        kind = ("above", "below")[number % 2]
        place = folder / kind / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(kind, rng))
    return folder
