"""Head training without the backbone: where nothing below the head is trained, its inputs are computed once and kept.

Head rounds then cost one forward pass over a site's rows for the whole run. The backbone computes as in evaluation,
without dropout: frozen, it is a function of the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from giva_core.config import TrainConfig
from giva_core.models import MeanPoolingClassifier, TaskModel, label_tensor

from .training import EncodedData, pass_over

_LARGEST_BYTES = 256 * 2**20


class FrozenHead:
    """The head alone, with a task model's manners: `collate`, `forward`, `task_loss`.

    Args:
        task: A task model with mean pooling and one linear head.
    """

    def __init__(self, task: TaskModel) -> None:
        self._task = task
        self.model = task.model.get_submodule(task.head_modules[0])
        self.num_outputs = task.num_outputs

    def collate(self, encoded: Sequence[Any], labels: Any = None) -> dict[str, torch.Tensor]:
        """Rows of features `(n, hidden)` and the labels."""
        return {"features": torch.from_numpy(np.stack(encoded)), "labels": label_tensor(labels, self._task.kind)}

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits `(n, C)`, in float32 as in the whole model."""
        with torch.autocast(batch["features"].device.type, enabled=False):
            return self.model(batch["features"])

    def task_loss(self, logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The task's loss."""
        return self._task.task_loss(logits, labels, reduction)


def can_freeze(task: TaskModel, trained_modules: Sequence[str], num_examples: int) -> bool:
    """Whether the head's inputs are all that its training needs, and fit into memory."""
    if not isinstance(task.model, MeanPoolingClassifier) or tuple(trained_modules) != task.head_modules:
        return False
    head = task.model.get_submodule(task.head_modules[0])
    return isinstance(head, torch.nn.Linear) and 4 * head.in_features * num_examples <= _LARGEST_BYTES


def head_inputs(task: TaskModel, data: EncodedData, config: TrainConfig) -> EncodedData:
    """What reaches the head for each example: float32 `(hidden,)`, as the features of a new data set."""
    head = task.model.get_submodule(task.head_modules[0])
    rows = np.zeros((len(data), int(head.in_features)), np.float32)  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        for indices, _, _ in pass_over(task, data, config):
            rows[indices] = seen.pop().float().cpu().numpy()
    finally:
        handle.remove()
    return EncodedData(list(rows), data.labels, data.lengths)  # the same batches as with the texts
