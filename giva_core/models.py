"""Pretrained models with a task head: loading, tokens to batches, outputs to losses. The only import of transformers.

Two heads. `native` is the model's own, through `AutoModelForSequenceClassification`. `mean` pools for encoders that
were made for it (Reimers & Gurevych, arXiv:1908.10084): with `h_t` the last hidden states of the `T` tokens,

    z = s · u / ‖u‖₂,   u = (1/T) Σ_t h_t,   s = 10,     logits = W z + b

so that training the head alone is a logistic regression on the frozen sentence vector. What a head has and the
checkpoint does not bring starts at `uniform(-1, 1) / sqrt(fan_in)`, biases at zero, drawn from the shared seed by
integer arithmetic: every site starts with the same head, on every machine. `W = 0` would not do, since no gradient
reached the backbone through it.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from . import exact
from .config import RunConfig
from .errors import ConfigError
from .paths import expand

PAD_MULTIPLE = 8
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}

#: A text in which tokenizers differ: case, accents, digits, punctuation, other scripts, white space.
_PROBE = "The Quick brown fox's 1,234 naïve cafés; ÄÖÜß Ünïcode, Привет 漢字 ①½\t don't-stop  e.g. x² A b C."
_SPECIAL_TOKENS = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")

#: Settings that say nothing about the frozen model: where it came from, its type (the weights show it), its task.
_NO_SETTINGS = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "num_labels", "id2label"),
    *("label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict", "use_cache"),
}

Encoded = dict[str, list[int]]
Batch = dict[str, torch.Tensor]


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
        return SequenceClassifierOutput(logits=self.classifier(self.scale * functional.normalize(pooled, dim=-1)))


@dataclass(frozen=True, eq=False)
class TaskModel:
    """A model with its head and tokenizer, ready for one task.

    Attributes:
        model: The network; the backbone is frozen, the head is trainable and float32.
        tokenizer: The model's tokenizer.
        head_modules: Names of the modules that make up the head; they are trained whole and are no targets.
        kind: `classification`, `multilabel` or `regression`.
        num_outputs: Outputs C: the number of labels, 1 for regression.
        max_positions: Tokens that the model can take.
        frozen: The backbone's parameters and stored buffers by name, as they were loaded.
    """

    model: nn.Module
    tokenizer: Any
    head_modules: tuple[str, ...]
    kind: str
    num_outputs: int
    max_positions: int
    frozen: Mapping[str, torch.Tensor] = field(repr=False)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits `(n, C)` of a batch from `collate`; its labels are not looked at."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.model(**inputs).logits

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
        encoded = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=True,
            max_length=min(max_length, self.max_positions),
            return_attention_mask=False,
            return_token_type_ids=self._takes_segments,
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
        longest = max(len(item["input_ids"]) for item in encoded)
        length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(self.max_positions, longest))
        batch: Batch = {}
        for key in encoded[0]:
            padding = self.tokenizer.pad_token_id if key == "input_ids" else 0
            rows = np.full((len(encoded), length), padding, dtype=np.int64)
            for row, item in zip(rows, encoded, strict=True):
                row[: len(item[key])] = item[key]
            batch[key] = torch.from_numpy(rows)
        lengths = torch.tensor([len(item["input_ids"]) for item in encoded])
        batch["attention_mask"] = (torch.arange(length)[None, :] < lengths[:, None]).long()
        if labels is not None:
            dtype = torch.long if self.kind == "classification" else torch.float32
            batch["labels"] = torch.as_tensor(np.asarray(labels)).to(dtype)
        return batch

    def task_loss(self, logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The task's loss in float32: cross entropy; binary cross entropy, mean over labels; or squared error.

        Args:
            logits: `(n, C)`.
            labels: As `collate` returns them.
            reduction: `mean` or `sum` over the examples.
        """
        logits = logits.float()
        if self.kind == "classification":
            losses = functional.cross_entropy(logits, labels, reduction="none")
        elif self.kind == "multilabel":
            losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
        else:
            losses = (logits.squeeze(-1) - labels).square()
        return losses.mean() if reduction == "mean" else losses.sum()

    def weights_digest(self) -> str:
        """SHA-256 (hex) of the model below the head: weights, tokenizer and what else decides its outputs.

        Names, types, shapes and bytes of the weights; the vocabulary, special tokens, and the ids of a fixed probe
        text; and the configuration's settings that are not their class's defaults, which differ little between
        versions of transformers. Counted at the first call, which must come before anything is merged into the weights.
        """
        return self._digest

    def save(self, folder: str | Path) -> None:
        """Write a transformers folder with the tokenizer; `load_task_model` reads it back."""
        with _quiet():
            self.model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        digest.update(json.dumps(self._reading(), sort_keys=True, default=str).encode())
        for name in sorted(self.frozen):
            tensor = self.frozen[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _reading(self) -> list[Any]:
        """How texts become numbers, and how the weights are computed with."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        special = [getattr(self.tokenizer, f"{name}_token_id", None) for name in _SPECIAL_TOKENS]
        probes = [self.encode([_PROBE]), self.encode([_PROBE], [_PROBE[::-1]], max_length=12)]
        return [vocabulary, special, probes, self.max_positions, _settings_of(self.model.config)]

    @cached_property
    def _takes_segments(self) -> bool:
        known = "token_type_ids" in self.tokenizer.model_input_names
        return known and "token_type_ids" in inspect.signature(self.model.base_model.forward).parameters  # type: ignore[union-attr]


def load_task_model(config: RunConfig) -> TaskModel:
    """Load `config.model` with the head that `config.task` asks for.

    Frozen weights have the type `model.dtype`, the head is float32. Head parameters that the checkpoint does not
    bring (or brings for another number of outputs) start at `uniform(-1, 1) / sqrt(fan_in)` from `giva.seed` and the
    parameter's name; others are kept.

    Raises:
        ConfigError: No such model, a hub id where only local files are allowed, weights that are not safetensors or
            do not fit the architecture, or a task without labels.
    """
    num_outputs = _num_outputs(config)
    source = _source(config)
    options: dict[str, Any] = {"local_files_only": config.model.local_files_only, "trust_remote_code": False}
    if config.model.revision and not Path(source).is_dir():
        options["revision"] = config.model.revision
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            settings = _settings(AutoConfig.from_pretrained(source, **options), tokenizer, config, num_outputs)
            auto: Any = MeanPoolingClassifier if config.task.head == "mean" else AutoModelForSequenceClassification
            model, loaded = auto.from_pretrained(
                source,
                config=settings,
                dtype=getattr(torch, config.model.dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"the model {source} cannot be loaded",
            got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            expected="a transformers folder with config.json, tokenizer.json and model.safetensors",
            remedy="check the folder, or convert the weights to safetensors with the model's save_pretrained",
            public="the model cannot be loaded",
        ) from error
    new = set(loaded["missing_keys"]) | {entry[0] for entry in loaded["mismatched_keys"]}
    head_modules = _head_modules(model, new, source)
    head = {name: value for name, value in model.named_parameters() if _inside(name, head_modules)}
    for name in sorted(new & head.keys()):
        _start(name, head[name], config)
    _separate(model, head_modules)
    persistent = model.state_dict().keys()
    frozen = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if k in persistent}}
    return TaskModel(
        model=model.eval(),
        tokenizer=tokenizer,
        head_modules=head_modules,
        kind=config.task.kind,
        num_outputs=num_outputs,
        max_positions=_max_positions(model, tokenizer),
        frozen={name: tensor for name, tensor in frozen.items() if not _inside(name, head_modules)},
    )


# -- what to load -----------------------------------------------------------------------------------------------------


def _num_outputs(config: RunConfig) -> int:
    least = {"classification": 2, "multilabel": 1, "regression": 0}[config.task.kind]
    if len(config.task.labels) < least:
        raise ConfigError(
            f"task.kind = {config.task.kind} needs its labels",
            got=f"{len(config.task.labels)} labels",
            expected=f"at least {least} in task.labels",
            remedy="list the labels that all sites have agreed on",
        )
    return 1 if config.task.kind == "regression" else len(config.task.labels)


def _source(config: RunConfig) -> str:
    """The folder to load from, or a hub id where that is allowed."""
    path = config.model.path
    if not path:
        raise ConfigError(
            "model.path is not set", expected="the folder of a pretrained model", public="the model is not set"
        )
    if expand(path).is_dir():
        return str(expand(path))
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path):
        raise ConfigError(
            f"there is no model folder {path}",
            remedy="check model.path; at a site, the path in the site's own settings",
            public="the model folder is missing",
        )
    if config.model.local_files_only:
        raise ConfigError(
            f"there is no model folder {path}, and asking a model hub for it is not allowed",
            cause="model.local-files-only is on, which is the default",
            remedy="download the model and set model.path to its folder, or set model.local-files-only = false",
            public="the model folder is missing",
        )
    return path


def _settings(settings: Any, tokenizer: Any, config: RunConfig, num_outputs: int) -> Any:
    """The model's own configuration, with the task written into it and a padding token made sure of."""
    settings.num_labels = num_outputs
    settings.problem_type = PROBLEM_TYPES[config.task.kind]
    if config.task.kind != "regression":
        settings.id2label = dict(enumerate(config.task.labels))
        settings.label2id = {label: index for index, label in enumerate(config.task.labels)}
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has neither a padding nor an end token", remedy="add one of them to the tokenizer"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > getattr(settings, "vocab_size", len(tokenizer)):
        raise ConfigError(
            "the tokenizer knows more tokens than the model",
            got=f"{len(tokenizer)} tokens",
            expected=f"at most {settings.vocab_size}",
            cause="the tokenizer belongs to another model",
            public="tokenizer and model do not fit together",
        )
    settings.pad_token_id = tokenizer.pad_token_id
    return settings


def _settings_of(config: Any) -> dict[str, Any]:
    """The settings that decide what the model computes, without those at their class's default."""
    try:
        default = type(config)().to_dict()
    except (TypeError, ValueError):  # a composed configuration, which has no default
        default = {}
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in _NO_SETTINGS and (key not in default or value != default[key])
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off stderr; what matters in them is checked here."""
    logging = transformers.utils.logging
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


# -- head and backbone ------------------------------------------------------------------------------------------------


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _head_modules(model: Any, new: set[str], source: str) -> tuple[str, ...]:
    """Everything outside the base model, and a pooler inside it that the checkpoint does not bring."""
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    outside = [name for name in children if name != model.base_model_prefix]
    inside = {name.rpartition(".")[0] for name in new if not _inside(name, outside)}
    strangers = sorted(name for name in inside if "pooler" not in name.split("."))
    if strangers:
        raise ConfigError(
            f"the weights of {source} do not cover the backbone",
            got=f"nothing that fits {len(strangers)} modules, the first being {strangers[0]}",
            cause="config.json and model.safetensors belong to different models",
            remedy="use the folder of one complete pretrained model",
            public="the model's weights do not fit its configuration",
        )
    return (*outside, *sorted(inside))


def _start(name: str, parameter: nn.Parameter, config: RunConfig) -> None:
    """Set a new head parameter to its start, the same at every site."""
    # the mean head is not zero either: no gradient would reach the backbone through it, and nothing could be sketched
    if name.endswith("bias"):
        value = np.zeros(parameter.shape, np.float32)
    elif parameter.dim() < 2:  # the gain of a normalisation
        value = np.ones(parameter.shape, np.float32)
    else:
        fan_in = math.prod(parameter.shape[1:])
        draw = exact.uniform(config.giva.seed, f"head:{name}", tuple(parameter.shape))
        value = draw * np.float32(1.0 / math.sqrt(fan_in))
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(value))


def _separate(model: nn.Module, head_modules: Sequence[str]) -> None:
    """Freeze the backbone; make the head trainable, float32, and let it take what a half-precision backbone gives."""
    model.requires_grad_(False)
    for name in head_modules:
        head = model.get_submodule(name).float().requires_grad_(True)
        head.register_forward_pre_hook(_float32_inputs)


def _float32_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)


def _max_positions(model: Any, tokenizer: Any) -> int:
    """Tokens the model takes. RoBERTa's kind counts positions from behind the padding index, and so takes fewer."""
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or sys.maxsize)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, module.num_embeddings - skipped)
    return int(limit)
