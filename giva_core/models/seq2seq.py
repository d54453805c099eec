"""Texts from texts, by an encoder and a decoder (T5 and its kin): the kind `seq2seq`.

The prompt, in its template, is read by the encoder; the completion, with its end token, is what the decoder learns.
Either is cut at the end after `task.max-length` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ..config import RunConfig
from ..errors import ConfigError
from ..rows import Dialogue
from .answers import AnswerModel, answer_outputs, load_answering
from .loading import load_processor, load_settings
from .task import Batch, Encoded
from .tokens import attention, padded


@dataclass(frozen=True, eq=False)
class Seq2Seq(AnswerModel):
    """An encoder and a decoder; an example is `input_ids` for the one and `target_ids` for the other."""

    def encode_dialogue(self, row: Dialogue, max_length: int) -> Encoded:
        """Ids of prompt and answer, each with the special tokens that the model was made with."""
        (_, prompt), (_, answer) = row.turns
        template = self.task.prompt_template
        source = self._ids(template.replace("{prompt}", prompt) if template else prompt, special=True)
        target = self._ids(answer, special=True)
        end = self.processor.eos_token_id
        if end is not None and target[-1:] != [end]:
            target = [*target, end]
        return {"input_ids": source[:max_length], "target_ids": target[:max_length]}

    def collate(self, encoded: Sequence[Encoded], labels: Any = None) -> Batch:
        """`input_ids`, `attention_mask` `(n, source)`, `target_ids`, `answers` `(n, target)`; `labels` where given."""
        targets = [item["target_ids"] for item in encoded]
        ids = padded(targets, self.processor.pad_token_id, self.max_positions)
        batch = {**self.prompts(encoded), "target_ids": ids, "answers": attention(targets, ids.shape[1])}
        if labels is not None:
            batch["labels"] = torch.as_tensor(labels)
        return batch

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Outputs `(n, 3)`."""
        network, targets = self._network, batch["target_ids"]
        start = torch.full_like(targets[:, :1], network.config.decoder_start_token_id)
        logits = network(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=torch.cat([start, targets[:, :-1]], dim=1),
            use_cache=False,
        ).logits
        return answer_outputs(logits, targets, batch["answers"].bool())

    def prompts(self, encoded: Sequence[Encoded]) -> Batch:
        """What the encoder reads."""
        sequences = [item["input_ids"] for item in encoded]
        ids = padded(sequences, self.processor.pad_token_id, self.max_positions)
        return {"input_ids": ids, "attention_mask": attention(sequences, ids.shape[1])}

    def length(self, encoded: Encoded) -> int:
        """Tokens of prompt and answer."""
        return len(encoded["input_ids"]) + len(encoded["target_ids"])

    def gradient_terms(self, encoded: Sequence[Encoded], layers: Sequence[str]) -> int:
        """Different tokens of the site's own that the adapted halves read: positions are relative.

        What the server knows, its template's tokens, it can take out of a sketch.
        """
        known = self.known_ids()
        sources = [item["input_ids"] for item in encoded]
        inputs = [item["target_ids"][:-1] for item in encoded]
        in_encoder = all("encoder" in name.split(".") for name in layers)
        read = [sources] if in_encoder else [sources, inputs]
        return min(len({token for ids in sequences for token in ids} - known) for sequences in read)

    @property
    def _network(self) -> Any:
        return self.model


def load(config: RunConfig) -> Seq2Seq:
    """Load an encoder with its decoder and their tokenizer, all frozen."""
    tokenizer = load_processor(config, AutoTokenizer)
    settings = load_settings(config)
    if not getattr(settings, "is_encoder_decoder", False):
        raise ConfigError(
            "the model has no encoder that a decoder answers to",
            got=settings.model_type,
            expected="a model of T5's kind",
            remedy="use task.kind = causal-lm for a decoder alone",
            public="the model does not fit the kind of task",
        )
    return load_answering(Seq2Seq, config, AutoModelForSeq2SeqLM, settings, tokenizer)
