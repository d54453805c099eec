"""Models of known shapes with random weights, and the adapters that are compared on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
import transformers
from _configs import CONFIGS, GATED
from torch import Tensor, nn
from torch.nn import functional as F

from giva_core.bases import bases_digest
from giva_core.inject import adapted_layers, inject
from giva_core.types import Bases, BasesSet, LayerShape

VISION = r".*\.(query|key|value|[qkv]_proj|fc1|fc2)"  # the names changed in transformers 5
LABELS = 100  # more than the ranks: the last layer's gradient in CLIP's tower has rank LABELS - 1 at most
#: Off: they cost all methods the same, and calibration, in eval mode, nothing.
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model to build, and the batch that it is trained on.

    Attributes:
        config: Name of transformers' configuration.
        values: What it is made with.
        targets: `giva.target-modules`.
        examples: Examples of a batch on a GPU; the paper's where it gives one.
        cpu_examples: Examples of a batch on a CPU.
        tokens: Tokens of an example; None for images, whose size the configuration has.
        is_causal: A language model; else an encoder with mean pooling and a trained head.
    """

    config: str
    values: dict[str, Any]
    targets: tuple[str, ...] | str = "all-linear"
    examples: int = 64
    cpu_examples: int = 8
    tokens: int | None = 128
    is_causal: bool = False


SHAPES = {
    "minilm": Shape(*CONFIGS["minilm"]),
    "roberta-base": Shape(*CONFIGS["roberta-base"]),
    "qwen2-0.5b": Shape(*CONFIGS["qwen2-0.5b"], GATED, 16, 1, 512, True),
    "olmo2-7b": Shape(*CONFIGS["olmo2-7b"], GATED, 16, 1, 512, True),
    "dinov2-base": Shape(*CONFIGS["dinov2-base"], VISION, 128, 4, None),
    "clip-large": Shape(*CONFIGS["clip-large"], VISION, 128, 2, None),
}


class Encoder(nn.Module):
    """A backbone with mean pooling and a linear head."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, LABELS)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The summed loss of a batch."""
        states = self.backbone(**inputs).last_hidden_state
        return F.cross_entropy(self.head(states.mean(1)).float(), labels, reduction="sum")


class Causal(nn.Module):
    """A language model; its loss is on the second half of each example, as if the first were the prompt."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The summed loss of a batch: of each example, the mean over its answer."""
        answer = labels.shape[1] // 2
        logits = self.backbone(**inputs, use_cache=False, logits_to_keep=answer + 1).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, -answer:].flatten(), reduction="sum") / answer


def build(shape: Shape, device: torch.device, dtype: torch.dtype, blocks: int | None = None) -> nn.Module:
    """The frozen model with random weights, of fewer blocks if asked; the head of an encoder asks for a gradient."""
    config = getattr(transformers, shape.config)(**shape.values, attn_implementation="sdpa")
    config.num_hidden_layers = blocks or config.num_hidden_layers
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    with torch.device(device):
        auto = transformers.AutoModelForCausalLM if shape.is_causal else transformers.AutoModel
        options = {"add_pooling_layer": False} if shape.config in ("BertConfig", "RobertaConfig") else {}
        backbone = auto.from_config(config, dtype=dtype, **options).requires_grad_(False)
        model = Causal(backbone) if shape.is_causal else Encoder(backbone, config.hidden_size).to(dtype)
    return model.train()


def make_batch(shape: Shape, examples: int, device: torch.device, dtype: torch.dtype) -> Batch:
    """Random inputs of the model's kind."""
    torch.manual_seed(1)
    if shape.tokens is None:
        size = shape.values["image_size"]
        inputs: Batch = {"pixel_values": torch.randn(examples, 3, size, size, dtype=dtype)}
    else:
        inputs = {"input_ids": torch.randint(5, shape.values.get("vocab_size", 30522), (examples, shape.tokens))}
    labels = inputs["input_ids"] if shape.is_causal else torch.randint(LABELS, (examples,))
    return {name: tensor.to(device) for name, tensor in {**inputs, "labels": labels}.items()}


def tokens_of(shape: Shape, examples: int) -> int:
    """Tokens that pass a layer."""
    return examples * (shape.tokens or (shape.values["image_size"] // shape.values["patch_size"]) ** 2 + 1)


def random_bases(layers: Sequence[LayerShape], ranks: Sequence[int]) -> BasesSet:
    """Orthonormal, from Gaussians: everything takes as long as with calibrated ones."""
    rng = np.random.default_rng(0)

    def columns(rows: int, r: int) -> np.ndarray:
        return np.linalg.qr(rng.normal(size=(rows, r)))[0].astype(np.float32)

    made = {x.name: Bases(columns(x.d_in, r).T.copy(), columns(x.d_out, r)) for x, r in zip(layers, ranks, strict=True)}
    return BasesSet(made, "rand", bases_digest(made, "rand"))


# -- adapters ---------------------------------------------------------------------------------------------------------


class Osora(nn.Module):
    """`y = base(x) + o ∘ U (s ∘ (Vᵀ x))`, U and V frozen singular vectors of the base weight, o and s trained.

    OSoRA as its paper writes it; it takes `U S Vᵀ` off the base weight before, which costs nothing in a step. The
    vectors are those of a short randomised SVD: a step takes as long with them, and the whole SVD of a 7B model hours.
    """

    U: Tensor
    Vh: Tensor

    def __init__(self, base_layer: nn.Module, r: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        U, S, V = torch.svd_lowrank(weight.float(), q=min(r, *weight.shape), niter=1)
        self.register_buffer("U", U.to(weight.dtype).contiguous())
        self.register_buffer("Vh", V.T.to(weight.dtype).contiguous())
        self.s = nn.Parameter(S.to(weight.dtype))
        self.o = nn.Parameter(torch.ones(len(weight), dtype=weight.dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output."""
        return self.base_layer(x) + F.linear(F.linear(x, self.Vh) * self.s, self.U) * self.o


Method = Callable[[nn.Module, tuple[LayerShape, ...], BasesSet, int], nn.Module]


def _giva(model: nn.Module, layers: tuple[LayerShape, ...], bases: BasesSet, r: int) -> nn.Module:
    for layer in adapted_layers(inject(model, bases, trainable=("head",) if hasattr(model, "head") else ())).values():
        nn.init.normal_(layer.lambda_o, std=1e-3)
    return model


def _osora(model: nn.Module, layers: tuple[LayerShape, ...], bases: BasesSet, r: int) -> nn.Module:
    for layer in layers:
        model.set_submodule(layer.name, Osora(model.get_submodule(layer.name), r))
    return model


def _by_peft(config: type, **options: Any) -> Method:
    def add(model: nn.Module, layers: tuple[LayerShape, ...], bases: BasesSet, r: int) -> nn.Module:
        settings = config(r=r, target_modules=[layer.name for layer in layers], **options)
        # in the weights' type: PEFT's default of float32 would compute, and keep, a float32 copy of every layer's input
        wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
        model = wrapped.base_model.model  # without the wrapper, which costs time
        if hasattr(model, "head"):
            model.head.requires_grad_(True)
        return model

    return add


#: By name: how it is added to a model, and at which rank.
METHODS: dict[str, tuple[Method, int]] = {
    "giva": (_giva, 64),
    "lora": (_by_peft(peft.LoraConfig, lora_alpha=16), 16),
    "vera": (_by_peft(peft.VeraConfig), 1024),
    "randlora": (_by_peft(peft.RandLoraConfig), 32),
    "osora": (_osora, 512),
}


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same frozen weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
