"""A small vision transformer, trained from nothing on a few minutes' worth of images: what the vision demo starts from.

No pretrained ViT can be had from the package indexes. This one has seen a few classes of small pictures, and is to
other pictures of the kind what a published model is to photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from .loading import quiet
from .pixels import PixelReader

_BATCH, _EPOCHS, _RATE = 64, 3, 1e-3


def pretrain_small_vit(
    folder: Path, pixels: np.ndarray, classes: np.ndarray, seed: int, progress: Callable[[str], None]
) -> float:
    """Train a ViT of 4 layers of 64 and write it, without its head, into an existing folder.

    Args:
        folder: Where to.
        pixels: Grey images `(n, size, size)`, bytes; size a multiple of 4.
        classes: Their classes `(n,)`, from 0; the last tenth of the images is held out.
        seed: Seed of weights and order.
        progress: Takes a sentence on what is being done.

    Returns:
        Accuracy on the images held out.
    """
    size = pixels.shape[-1]
    settings = {"size": {"height": size, "width": size}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    reader = PixelReader.from_settings(settings)
    torch.manual_seed(seed)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=size,
            patch_size=4,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=int(classes.max()) + 1,
        )
    )

    def logits(rows: np.ndarray) -> torch.Tensor:
        grey = np.repeat(pixels[rows][:, None], 3, axis=1)
        return model(pixel_values=torch.from_numpy(reader.normalised(grey))).logits

    count = len(pixels) - len(pixels) // 10
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.05)
    for epoch in range(_EPOCHS):
        losses = []
        order = rng.permutation(count)
        for start in range(0, count, _BATCH):
            rows = order[start : start + _BATCH]
            loss = functional.cross_entropy(logits(rows), torch.from_numpy(classes[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        progress(f"pretraining epoch {epoch + 1} of {_EPOCHS}: mean loss {np.mean(losses):.3f}")
    model.eval()
    with torch.no_grad():
        held = np.arange(count, len(pixels))
        found = [logits(held[start : start + 256]).argmax(-1).numpy() for start in range(0, len(held), 256)]
    with quiet():
        model.vit.save_pretrained(folder, safe_serialization=True)
    reader.save_pretrained(folder)
    return float((np.concatenate(found) == classes[held]).mean())
