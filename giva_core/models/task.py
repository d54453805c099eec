"""The seam between the training loop and the kinds of tasks: what every kind of task can do.

A kind is one module of this package with a function `load(config)`, which returns its `TaskModel`, and an entry in
`__init__.KINDS`. The loop sees batches, outputs `(n, C)` and losses; what an output is, is the kind's own affair, and
`giva_core.metrics` makes metrics of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import TaskConfig
from ..errors import ConfigError
from .loading import quiet

Encoded = dict[str, Any]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class TaskModel:
    """A model and what makes numbers of examples, ready for one task.

    Attributes:
        model: The network; the backbone is frozen, the head is trainable and float32.
        processor: The model's tokenizer, or what else turns an example into numbers.
        head_modules: Names of the modules that make up the head; they are trained whole and are no targets.
        task: The run's task.
        num_outputs: Outputs C of an example.
        max_positions: Tokens that the model can take.
        frozen: The backbone's parameters and stored buffers by name, as they were loaded.
    """

    model: nn.Module
    processor: Any
    head_modules: tuple[str, ...]
    task: TaskConfig
    num_outputs: int
    max_positions: int
    frozen: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def kind(self) -> str:
        """`task.kind`."""
        return self.task.kind

    # -- what a kind says for itself ----------------------------------------------------------------------------------

    def encode_rows(self, rows: Iterable[Any], max_length: int) -> list[Encoded]:
        """Each example as numbers, without padding.

        Args:
            rows: n examples of the kind's type in `giva_core.rows`, gone through once.
            max_length: Tokens at most, where the kind has a choice.
        """
        raise NotImplementedError

    def collate(self, encoded: Sequence[Encoded], labels: Any = None) -> Batch:
        """Tensors of n encoded examples, and `labels` where given."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Outputs `(n, C)` of a batch from `collate`."""
        raise NotImplementedError

    def task_loss(self, outputs: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The task's loss in float32, `mean` or `sum` over the examples: each counts the same, whatever its length."""
        raise NotImplementedError

    def length(self, encoded: Encoded) -> int:
        """Tokens of an encoded example; examples of similar length share a batch."""
        raise NotImplementedError

    def gradient_terms(self, encoded: Sequence[Encoded], layers: Sequence[str]) -> int:
        """How many different outer products `δ_t x_tᵀ` a layer's gradient is a sum of, at least.

        It bounds the gradient's rank, and so what a sketch of it gives away.

        Args:
            encoded: The examples behind the gradient.
            layers: Names of the layers.
        """
        raise NotImplementedError

    def judged(self, outputs: np.ndarray, encoded: Sequence[Encoded], labels: np.ndarray, size: int) -> np.ndarray:
        """What metrics are made of: the outputs `(n, C)`, and what an evaluation adds to them.

        Args:
            outputs: Of the n examples.
            encoded: The examples.
            labels: Their labels.
            size: Examples in a forward pass.
        """
        return outputs

    def _reading(self) -> list[Any]:
        """How examples become numbers, and how the weights are computed with: JSON that sites have to agree on."""
        raise NotImplementedError

    # -- the same for every kind --------------------------------------------------------------------------------------

    def weights_digest(self) -> str:
        """SHA-256 (hex) of the model below the head: weights, tokenizer and what else decides its outputs.

        Names, types, shapes and bytes of the weights; the vocabulary, special tokens, and the ids of a fixed probe
        text; and the configuration's settings that are not their class's defaults, which differ little between
        versions of transformers. Counted at the first call, which must come before anything is merged into the weights.
        """
        return self._digest

    def save(self, folder: str | Path) -> None:
        """Write a transformers folder with the tokenizer; `load_task_model` reads it back."""
        with quiet():
            self.model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
            self.processor.save_pretrained(folder)

    def checkpoint_activations(self, on: bool) -> None:
        """In training keep the input of each block only, and compute the rest again for the gradient.

        Raises:
            ConfigError: The architecture has no blocks that can do so.
        """
        network: Any = self.model
        if on == any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
            return
        if on and not network.supports_gradient_checkpointing:
            raise ConfigError(
                "the model has no gradient checkpointing",
                got=type(network).__name__,
                remedy="set train.gradient-checkpointing = false",
            )
        # the name that transformers 5 began with, and its successor
        prefix = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
        if on:  # the reentrant form would cut the graph behind frozen layers
            getattr(network, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
            # the other form needs a gradient at the inputs, which would keep what frozen layers have no use for
            network.disable_input_require_grads()
        else:
            getattr(network, f"{prefix}_checkpointing_disable")()

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        digest.update(json.dumps(self._reading(), sort_keys=True, default=str).encode())
        for name in sorted(self.frozen):
            tensor = self.frozen[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
