"""The methods by name, and the settings of those beside GiVA."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import Section, option

#: What the methods are is told in giva_core/methods, one module each, and in docs/methods.md.
METHODS = (
    *("giva", "lora", "ffa-lora", "rolora", "fedex-lora", "vera", "osora", "randlora", "lora-xs"),
    *("full", "head"),
)
LORA_FAMILY = ("lora", "ffa-lora", "rolora", "fedex-lora")
#: Those whose layers are PEFT's.
PEFT_METHODS = (*LORA_FAMILY, "vera", "randlora")


@dataclass(frozen=True)
class LoraConfig(Section):
    """LoRA (Hu et al., arXiv:2106.09685) and its federated forms: ffa-lora, rolora, fedex-lora."""

    _prefix = "lora."
    rank: int = option(8, "rank of the matrices", minimum=1)
    alpha: float = option(16.0, "scale numerator: the update is scaled by alpha / rank", above=0.0)


@dataclass(frozen=True)
class VeraConfig(Section):
    """The method vera (Kopiczko et al., arXiv:2310.11454), through PEFT's layers."""

    _prefix = "vera."
    rank: int = option(256, "rank of the random matrices that all layers share", minimum=1, maximum=1 << 16)
    d_initial: float = option(0.1, "what the vector d starts at", above=0.0)


@dataclass(frozen=True)
class RandloraConfig(Section):
    """The method randlora (Albert et al., arXiv:2502.00987), through PEFT's layers."""

    _prefix = "randlora."
    rank: int = option(32, "rank of each random basis; min(d_out, d_in) / rank of them make full rank", minimum=1)
    alpha: float = option(640.0, "scale numerator: the update is scaled by alpha / rank", above=0.0)


@dataclass(frozen=True)
class LoraXsConfig(Section):
    """The method lora-xs (Bałazy et al., arXiv:2405.17604); with bases = gradient as Fed-SB, but federated."""

    _prefix = "lora_xs."
    bases: str = option(
        "weight",
        "what the frozen bases are singular vectors of: the weight, or the federation's calibration gradient",
        choices=("weight", "gradient"),
    )
