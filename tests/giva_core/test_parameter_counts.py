"""The numbers of trained parameters that the paper reports, from the public configurations, without any weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from giva_core.config import GivaConfig
from giva_core.inject import layer_shapes

transformers = pytest.importorskip("transformers")

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
GATED = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...] | str, int, int]] = {
    "FacebookAI/roberta-base": (
        "RobertaConfig", ROBERTA, {"add_pooling_layer": False}, "all-linear", 8, 83_520,
    ),
    "FacebookAI/roberta-large": (
        "RobertaConfig", {**ROBERTA, **LARGE}, {"add_pooling_layer": False}, "all-linear", 8, 222_336,
    ),
    "Qwen/Qwen2-0.5B": (
        "Qwen2Config",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {}, GATED, 64, 173_568,
    ),
    "allenai/OLMo-2-1124-7B": (
        "Olmo2Config",
        {"vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32},
        {}, GATED, 64, 886_784,
    ),
    "mistralai/Mistral-7B-v0.1": (
        "MistralConfig",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8},
        {}, "all-linear", 32, 1_383_424,
    ),
    "facebook/dinov2-base": (
        "Dinov2Config",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "image_size": 518,
         "patch_size": 14},
        {}, r".*\.(query|key|value|[qkv]_proj|fc1|fc2)", 32, 75_648,  # the names changed in transformers 5
    ),
    "openai/clip-vit-large-patch14": (
        "CLIPVisionConfig", {**LARGE, "image_size": 224, "patch_size": 14, "projection_dim": 768},
        {}, ("q_proj", "k_proj", "v_proj", "fc1", "fc2"), 32, 200_448,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_id", CASES)
def test_trained_parameters_of_the_paper_models(model_id: str) -> None:
    config_name, values, options, targets, rank, expected = CASES[model_id]
    config = getattr(transformers, config_name)(**values)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, **options)
    layers, ranks = layer_shapes(model, GivaConfig(rank=rank, target_modules=targets))
    assert sum(layer.d_out + r for layer, r in zip(layers, ranks, strict=True)) == expected
