"""Tiny random models that write texts, one of each architecture, with a tokenizer of bytes: shapes only."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
# the form that transformers' own classes for GPT-2 and Qwen2 insist on, whatever the folder says
TOKENS = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_WIDE = {
    "vocab_size": len(TOKENS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 1}
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "olmo2": lambda: transformers.Olmo2Config(**_GROUPED),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=len(TOKENS),
        n_embd=16,
        n_inner=24,
        n_layer=2,
        n_head=2,
        n_positions=96,
        bos_token_id=2,
        eos_token_id=3,
    ),
}


def write_tokenizer(folder: Path, chat: bool = True) -> None:
    """A tokenizer with a token for each byte and each special token."""
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": _SPECIAL[4:]})
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_decoder(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A folder with a tiny decoder."""
    write_tokenizer(folder)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(DECODERS[kind]()).save_pretrained(folder)
    return folder


def write_t5(folder: Path, seed: int = 0) -> Path:
    """A folder with a tiny encoder and decoder."""
    write_tokenizer(folder, chat=False)
    torch.manual_seed(seed)
    settings = transformers.T5Config(
        **{"vocab_size": len(TOKENS), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        **{"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0, "dropout_rate": 0.0},
        initializer_factor=2.0,
    )
    transformers.T5ForConditionalGeneration(settings).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int = 0, options: bool = False, chat: bool = False) -> Path:
    """Prompts of letters with the answer `yes` where there are early letters, else `no`."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        early = rng.random() < 0.5
        prompt = "".join(rng.choices("abcdefghij" if early else "pqrstuvwxyz", k=rng.randint(2, 7)))
        answer = "yes" if early else "no"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        row: dict[str, object] = {"messages": turns} if chat else {"prompt": prompt, "completion": answer}
        lines.append(json.dumps({**row, "options": ["yes", "no"]} if options else row))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
