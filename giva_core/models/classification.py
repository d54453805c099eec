"""Texts to classes, sets of labels, or numbers: the kinds `classification`, `multilabel` and `regression`.

Two heads. `native` is the model's own, through `AutoModelForSequenceClassification`. `mean` pools for encoders that
were made for it (Reimers & Gurevych, arXiv:1908.10084): with `h_t` the last hidden states of the `T` tokens,

    z = s · u / ‖u‖₂,   u = (1/T) Σ_t h_t,   s = 10,     logits = W z + b

so that training the head alone is a logistic regression on the frozen sentence vector.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..config import RunConfig
from ..errors import ConfigError
from ..rows import TextRow
from .loading import frozen_arrays, load_network, load_processor, load_settings, prepare_heads, settings_of
from .task import Batch, Encoded, TaskModel
from .tokens import PROBE, attention, fit_tokenizer, max_positions, padded, vocabulary

PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


class MeanPoolingClassifier(PreTrainedModel):
    """Mean pooling over the attention mask, normalised, times `scale`, then one linear layer called `classifier`.

    The backbone is an attribute named as its own class names it (`bert`, `roberta`, ...), so that the weights of a
    saved folder also load as a plain `AutoModel`.

    Args:
        config: The backbone's configuration, with `num_labels`.
    """

    scale = 10.0
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ("classifier",)

    def __init__(self, config: Any) -> None:
        backbone = AutoModel.from_config(copy.deepcopy(config))
        if hasattr(backbone, "pooler"):  # not used by mean pooling, and so neither loaded nor adapted
            backbone.pooler = nn.Identity()
        super().__init__(config)
        self.base_model_prefix = backbone.base_model_prefix or "backbone"
        setattr(self, self.base_model_prefix, backbone)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers; the folder may be one that this class saved, or any encoder's."""
        if config is None:
            hub = {key: kwargs[key] for key in ("revision", "local_files_only", "cache_dir", "token") if key in kwargs}
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
        return super().from_pretrained(path, *args, config=config, **kwargs)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Logits `(n, num_labels)` of tokens `(n, length)`; pooling and head compute in float32."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs["return_dict"] = True
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        with torch.autocast(hidden.device.type, enabled=False):
            return SequenceClassifierOutput(logits=self.classifier(self.scale * functional.normalize(pooled, dim=-1)))


@dataclass(frozen=True, eq=False)
class SequenceClassifier(TaskModel):
    """A model that reads a text, or two, and answers with C logits, or one number."""

    def encode_rows(self, rows: Iterable[TextRow], max_length: int) -> list[Encoded]:
        """As `encode`; second texts go in where the rows have them."""
        rows = list(rows)
        pairs = [row.pair for row in rows if row.pair is not None]
        return self.encode([row.text for row in rows], pairs or None, max_length)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 512) -> list[Encoded]:
        """Token ids of each text, without padding, cut to `max_length` or to what the model can take.

        Args:
            texts: n texts.
            pairs: n second texts, or `None`.
            max_length: Tokens at most, special tokens included.

        Returns:
            n dictionaries with `input_ids` and, where the model has segments, `token_type_ids`.
        """
        if not texts:
            return []
        encoded = self.processor(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=True,
            max_length=min(max_length, self.max_positions),
            return_attention_mask=False,
            return_token_type_ids=self._takes_segments,
            split_special_tokens=True,  # a text that spells one is a text: T5 counts the ends of its rows
        )
        return [dict(zip(encoded.keys(), row, strict=True)) for row in zip(*encoded.values(), strict=True)]

    def collate(self, encoded: Sequence[Encoded], labels: Any = None) -> Batch:
        """Tensors `(n, length)`, padded to the longest text and on to a multiple of 8.

        Args:
            encoded: n texts from `encode`.
            labels: n class indices; or rows of C zeros and ones for `multilabel`; or n numbers for `regression`.

        Returns:
            `input_ids`, `attention_mask`, perhaps `token_type_ids`, and `labels` where given.
        """
        batch: Batch = {}
        for key in encoded[0]:
            padding = self.processor.pad_token_id if key == "input_ids" else 0
            batch[key] = padded([item[key] for item in encoded], padding, self.max_positions)
        ids = [item["input_ids"] for item in encoded]
        batch["attention_mask"] = attention(ids, batch["input_ids"].shape[1])
        if labels is not None:
            batch["labels"] = label_tensor(labels, self.kind)
        return batch

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits `(n, C)` of a batch from `collate`; its labels are not looked at."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.model(**inputs).logits

    def task_loss(self, outputs: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The task's loss in float32: cross entropy; binary cross entropy, mean over labels; or squared error.

        Args:
            outputs: `(n, C)`.
            labels: As `collate` returns them.
            reduction: `mean` or `sum` over the examples.
        """
        logits = outputs.float()
        if self.kind == "multilabel":
            losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
        elif self.kind == "regression":
            losses = (logits.squeeze(-1) - labels).square()
        else:
            losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses.mean() if reduction == "mean" else losses.sum()

    def length(self, encoded: Encoded) -> int:
        """Tokens, special ones included."""
        return len(encoded["input_ids"])

    def gradient_terms(self, encoded: Sequence[Encoded], layers: Sequence[str]) -> int:
        """Different tokens and places under mean pooling, which reads them all; else examples, of which it reads one.

        The first layer reads one vector for the same token at the same place. Special tokens are known to everybody,
        and whoever knows a vector can take it out of a sketch.
        """
        if self.task.head != "mean":
            return len(encoded)
        special = set(self.processor.all_special_ids)
        read = {place for item in encoded for place in enumerate(item["input_ids"]) if place[1] not in special}
        return len(read)

    def _reading(self) -> list[Any]:
        probes = [self.encode([PROBE]), self.encode([PROBE], [PROBE[::-1]], max_length=12)]
        return [*vocabulary(self.processor), probes, self.max_positions, settings_of(self.model.config)]

    @cached_property
    def _takes_segments(self) -> bool:
        known = "token_type_ids" in self.processor.model_input_names
        return known and "token_type_ids" in inspect.signature(self.model.base_model.forward).parameters  # type: ignore[union-attr]


def load(config: RunConfig) -> SequenceClassifier:
    """Load the model, its tokenizer, and the head that `task.head` asks for."""
    num_outputs = label_count(config)
    tokenizer = load_processor(config, AutoTokenizer)
    settings = load_settings(config)
    write_labels(settings, config, num_outputs)
    settings.problem_type = PROBLEM_TYPES[config.task.kind]
    fit_tokenizer(settings, tokenizer)
    auto: Any = MeanPoolingClassifier if config.task.head == "mean" else AutoModelForSequenceClassification
    model, new = load_network(config, auto, settings)
    head_modules = prepare_heads(model, new, config)
    return SequenceClassifier(
        model=model.eval(),
        processor=tokenizer,
        head_modules=head_modules,
        task=config.task,
        num_outputs=num_outputs,
        max_positions=max_positions(model, tokenizer),
        frozen=frozen_arrays(model, head_modules),
    )


# -- labels -----------------------------------------------------------------------------------------------------------


def label_count(config: RunConfig) -> int:
    """Outputs C: the number of labels, 1 for regression.

    Raises:
        ConfigError: The task has too few labels.
    """
    least = {"multilabel": 1, "regression": 0}.get(config.task.kind, 2)
    if len(config.task.labels) < least:
        raise ConfigError(
            f"task.kind = {config.task.kind} needs its labels",
            got=f"{len(config.task.labels)} labels",
            expected=f"at least {least} in task.labels",
            remedy="list the labels that all sites have agreed on",
        )
    return 1 if config.task.kind == "regression" else len(config.task.labels)


def write_labels(settings: Any, config: RunConfig, num_outputs: int) -> None:
    """Write the labels' names into the model's own configuration."""
    settings.num_labels = num_outputs
    if config.task.kind != "regression":
        settings.id2label = dict(enumerate(config.task.labels))
        settings.label2id = {label: index for index, label in enumerate(config.task.labels)}


def label_tensor(labels: Any, kind: str) -> torch.Tensor:
    """Class indices as int64, everything else as float32."""
    dtype = torch.float32 if kind in ("multilabel", "regression") else torch.long
    return torch.as_tensor(np.asarray(labels)).to(dtype)
