"""Images to classes: the kind `image-classification`, with the head that transformers gives the architecture.

ViT reads its first token, DINOv2 that and the mean of the patches, CLIP's vision tower the mean of the patches. Images
are resized once, when they are read, and kept as bytes: 150 KB each at 224 × 224.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForImageClassification
from transformers.utils import cached_file

from ..config import RunConfig
from ..errors import ConfigError, DataError
from ..rows import ImageRow
from .classification import label_count, label_tensor, write_labels
from .loading import find_source, frozen_arrays, hub_options, load_network, load_settings, prepare_heads, settings_of
from .pixels import FILE, PixelReader
from .task import Batch, Encoded, TaskModel


@dataclass(frozen=True, eq=False)
class ImageClassifier(TaskModel):
    """A model that looks at an image and answers with C logits; an example is `pixels`, bytes `(3, height, width)`."""

    def encode_rows(self, rows: Iterable[ImageRow], max_length: int) -> list[Encoded]:
        """Each image in the model's size, before the next is taken; `max_length` does not count."""
        encoded, faults = [], []
        for number, row in enumerate(rows, start=1):
            try:
                encoded.append({"pixels": self.processor.read(row.data)})
            except DataError:
                faults.append(number)
        if faults:
            raise DataError(
                "there are images that cannot be read",
                got=f"{len(faults)} of {len(faults) + len(encoded)}, the first being number {faults[0]}",
                expected="images that Pillow reads; in a folder they count by label and name",
                cause="damaged files, of another format, far too large, or with more than 8 bits a colour",
                remedy="correct, convert or remove them",
                public="unusable rows (image unreadable)",
            )
        return encoded

    def collate(self, encoded: Sequence[Encoded], labels: Any = None) -> Batch:
        """`pixel_values` `(n, 3, height, width)`, normalised, and `labels` where given."""
        pixels = self.processor.normalised(np.stack([item["pixels"] for item in encoded]))
        batch = {"pixel_values": torch.from_numpy(pixels)}
        if labels is not None:
            batch["labels"] = label_tensor(labels, self.kind)
        return batch

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits `(n, C)`."""
        pixels = batch["pixel_values"].to(next(self.model.parameters()).dtype)
        return self.model(pixel_values=pixels, **self._between_positions).logits

    def task_loss(self, outputs: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross entropy in float32, `mean` or `sum` over the examples."""
        return functional.cross_entropy(outputs.float(), labels, reduction=reduction)

    def length(self, encoded: Encoded) -> int:
        """All images are of one size."""
        return 1

    def gradient_terms(self, encoded: Sequence[Encoded], layers: Sequence[str]) -> int:
        """Examples: of an image the last layer sees one token, or all of its patches with the same gradient.

        Behind CLIP's last layer nothing but a mean and the head follow: its gradients lie between the C rows of the
        head's weight, in C − 1 directions.
        """
        config: Any = self.model.config
        if config.model_type == "clip":
            last = f"layers.{config.vision_config.num_hidden_layers - 1}.mlp.fc2"
            if any(name.endswith(last) for name in layers):
                return min(len(encoded), self.num_outputs - 1)
        return len(encoded)

    def _reading(self) -> list[Any]:
        return [self.processor.settings, settings_of(self.model.config)]

    @cached_property
    def _between_positions(self) -> dict[str, bool]:
        """Ask for positions between those that were learned, where images are of another size."""
        config: Any = self.model.config
        size = getattr(getattr(config, "vision_config", config), "image_size", None)
        learned = (size, size) if isinstance(size, int) else size and tuple(size)
        if learned == self.processor.shape or config.model_type == "dinov2":  # which always does so
            return {}
        return {"interpolate_pos_encoding": True}


def load(config: RunConfig) -> ImageClassifier:
    """Load the model, its image settings, and a head for the task's labels."""
    num_outputs = label_count(config)
    reader = PixelReader.from_settings(_image_settings(config))
    settings = load_settings(config)
    write_labels(settings, config, num_outputs)
    model, new = load_network(config, AutoModelForImageClassification, settings)
    head_modules = prepare_heads(model, new, config)
    return ImageClassifier(
        model=model.eval(),
        processor=reader,
        head_modules=head_modules,
        task=config.task,
        num_outputs=num_outputs,
        max_positions=1,
        frozen=frozen_arrays(model, head_modules),
    )


def _image_settings(config: RunConfig) -> dict[str, Any]:
    source = find_source(config)
    try:
        found = cached_file(source, FILE, **hub_options(config, source))
        settings: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the model {source} does not say how images become numbers",
            got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            expected=f"a readable {FILE} in its folder",
            remedy="save the model's image processor there",
            public="the model's image settings are missing",
        ) from None
    return settings
