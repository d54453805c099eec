"""Token ids: padding, what a tokenizer is known by, and how many positions a model has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError

PAD_MULTIPLE = 8

#: A text in which tokenizers differ: case, accents, digits, punctuation, other scripts, white space.
PROBE = "The Quick brown fox's 1,234 naïve cafés; ÄÖÜß Ünïcode, Привет 漢字 ①½\t don't-stop  e.g. x² A b C."
_SPECIAL_TOKENS = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")


def padded(sequences: Sequence[Sequence[int]], padding: int, most: int, left: bool = False) -> torch.Tensor:
    """Ids `(n, length)`, padded to the longest and on to a multiple of 8, but not beyond `most` tokens.

    Args:
        sequences: n sequences of ids.
        padding: What fills the rest.
        most: Tokens that the model can take.
        left: Whether the padding comes first.
    """
    longest = max(map(len, sequences))
    length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(most, longest))
    rows = np.full((len(sequences), length), padding, dtype=np.int64)
    for row, ids in zip(rows, sequences, strict=True):
        if left:
            row[length - len(ids) :] = ids
        else:
            row[: len(ids)] = ids
    return torch.from_numpy(rows)


def attention(sequences: Sequence[Sequence[int]], length: int, left: bool = False) -> torch.Tensor:
    """1 `(n, length)` where `padded` has put a token, 0 where padding."""
    lengths = torch.tensor([len(ids) for ids in sequences])[:, None]
    places = torch.arange(length)[None, :]
    return ((places >= length - lengths) if left else (places < lengths)).long()


def fit_tokenizer(settings: Any, tokenizer: Any) -> None:
    """Make sure of a padding token, in tokenizer and settings, and that the model knows every token.

    Raises:
        ConfigError: There is no tokenizer, it does not fit the model, or has no token to pad with.
    """
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where a folder has none
        raise ConfigError(
            "the model's tokenizer knows no words",
            got=f"{len(tokenizer)} tokens, all of them special",
            cause="the model's folder has no tokenizer.json, nor another file of a vocabulary",
            remedy="copy the tokenizer's files into it",
            public="the model's tokenizer is missing",
        )
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


def vocabulary(tokenizer: Any) -> list[Any]:
    """What a tokenizer is known by: its tokens and which of them are special."""
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL_TOKENS]
    return [sorted(tokenizer.get_vocab().items()), special]


def max_positions(model: Any, tokenizer: Any) -> int:
    """Tokens the model takes. RoBERTa's kind counts positions from behind the padding index, and so takes fewer."""
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or sys.maxsize)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, module.num_embeddings - skipped)
    return int(limit)
