"""From an image file to the numbers a model was made for, by its own preprocessor_config.json; needs Pillow alone.

transformers' image processors need torchvision, or are as slow as this; their steps are few and simple enough to take
here: convert to RGB, resize, crop the centre, scale, normalise. Resizing is Pillow's, as in the processors that the
published models were made with. There is no augmentation.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, DependencyError

FILE = "preprocessor_config.json"

#: An image of more pixels is refused: a small file may hold a picture that fills the memory.
_MOST_PIXELS = 100_000_000
#: What is opened: Pillow knows dozens more, and starts other programs for some of them.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


@dataclass(frozen=True, eq=False)
class PixelReader:
    """Reads images as arrays `(3, height, width)`.

    Attributes:
        resize: Height and width, or one number for the shorter edge; None for none.
        crop: Height and width of the centre that is kept; None for all.
        shape: Height and width of what comes out.
        resample: Pillow's number of the filter.
        factor: What a byte is multiplied with.
        mean: Subtracted from each channel.
        deviation: Each channel is divided by it.
        settings: The file's content.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    shape: tuple[int, int]
    resample: int
    factor: float
    mean: np.ndarray
    deviation: np.ndarray
    settings: Mapping[str, Any]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> PixelReader:
        """Take the content of a preprocessor_config.json.

        Raises:
            ConfigError: It names no size, or does what is not done here.
            DependencyError: Pillow is not installed.
        """
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            raise DependencyError(
                "reading images needs Pillow, which is not installed",
                remedy="pip install 'fedgiva[vision]'",
                public="the site cannot read images",
            ) from None
        crops = settings.get("do_center_crop", False)
        size = settings.get("size") if settings.get("do_resize", True) else None
        if isinstance(size, int):
            size = {"shortest_edge": size} if crops else {"height": size, "width": size}
        resize = _size(size) if size else None
        crop = settings.get("crop_size") if crops else None
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        fixed = _size(crop) if crop else resize
        if not isinstance(fixed, tuple):
            raise ConfigError(
                f"the model's {FILE} gives images no fixed size",
                got=json.dumps({"size": settings.get("size"), "crop_size": settings.get("crop_size")}),
                expected="height and width of size or crop_size",
                public="the model's image settings cannot be used",
            )
        normalises = settings.get("do_normalize", True)
        return cls(
            resize=resize,
            crop=fixed if crop else None,
            shape=fixed,
            resample=int(settings.get("resample", 2)),
            factor=float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
            mean=_channels(settings.get("image_mean", [0.5] * 3) if normalises else [0.0] * 3),
            deviation=_channels(settings.get("image_std", [0.5] * 3) if normalises else [1.0] * 3),
            settings=dict(settings),
        )

    def read(self, data: bytes) -> np.ndarray:
        """Bytes `(3, height, width)` of an image file of one of `FORMATS`, of 8 bits a colour.

        Raises:
            DataError: They are not an image, or a far too large one.
        """
        import PIL.Image

        try:
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                target = opened.size if self.resize is None else _target(self.resize, *opened.size)
                if max(math.prod(opened.size), math.prod(target)) > _MOST_PIXELS:
                    raise ValueError("too many pixels")
                if opened.mode.startswith(("I", "F")):  # conversion would cut them off at 255: a white picture
                    raise ValueError("more than 8 bits a colour")
                image: Any = opened.convert("RGB")
                if self.resize is not None:
                    image = image.resize(target, resample=self.resample)
        except Exception:  # Pillow's plugins raise whatever a broken file leads them to, and may quote it
            raise DataError(
                "an image cannot be read",
                cause="it is broken, of another format, far too large, or has more than 8 bits a colour",
                public="an image cannot be read",
            ) from None
        pixels = np.asarray(image, dtype=np.uint8)
        if self.crop:
            pixels = _centre(pixels, *self.crop)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """float32 `(n, 3, height, width)` of bytes of that shape."""
        scaled = pixels.astype(np.float32) * np.float32(self.factor)
        return (scaled - self.mean[:, None, None]) / self.deviation[:, None, None]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings as they were read."""
        Path(folder, FILE).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")


def _size(size: Mapping[str, int]) -> tuple[int, int] | int:
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    try:
        return int(size["height"]), int(size["width"])
    except KeyError:
        raise ConfigError(
            f"the model's {FILE} has a size of another form",
            got=json.dumps(dict(size)),
            expected="shortest_edge, or height and width",
            public="the model's image settings cannot be used",
        ) from None


def _target(resize: tuple[int, int] | int, width: int, height: int) -> tuple[int, int]:
    """Width and height after resizing; one number is the shorter edge, and the other follows."""
    if isinstance(resize, tuple):
        return resize[1], resize[0]
    short, long = sorted((width, height))
    other = max(1, math.floor(resize * long / short))
    return (resize, other) if width <= height else (other, resize)


def _channels(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of an image, with black around it where it is smaller."""
    above, left = max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])
    if above or left:
        pixels = np.pad(pixels, ((above - above // 2, above // 2), (left - left // 2, left // 2), (0, 0)))
    top, start = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, start : start + width]
