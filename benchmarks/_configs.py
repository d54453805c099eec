"""Public configurations of the models that benchmarks build or count: transformers' class, and what it is made with."""

from __future__ import annotations

from typing import Any

#: The layers of a decoder that the paper adapts.
GATED = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm": (
        "BertConfig",
        {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
         "intermediate_size": 1536},
    ),
    "roberta-base": ("RobertaConfig", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "qwen2-0.5b": (
        "Qwen2Config",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama-3.2-3b": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
         "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "olmo2-7b": (
        "Olmo2Config",
        {"vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False},
    ),
    "dinov2-base": (
        "Dinov2Config",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "image_size": 224,
         "patch_size": 14},
    ),
    "clip-large": (
        "CLIPVisionConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
         "image_size": 224, "patch_size": 14},
    ),
}  # fmt: skip
