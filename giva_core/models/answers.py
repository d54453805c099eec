"""Answers that are texts: what a language model and a sequence-to-sequence model have in common.

With `p_t` the probability that the model gives the answer's token t, `T` of them in an example's answers,

    loss = (1/n) Σ_i (1/T_i) Σ_t −log p_it

over the answers' tokens alone: every example counts the same, as in the federation's weights, whatever its length.
An output row is the sum of −log p over the answer's tokens, their number, and how many of them were the likeliest.
An evaluation adds, where it is asked to, whether a generated answer matched and whether the right option was likeliest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig

from ..config import RunConfig
from ..errors import ConfigError
from ..rows import Dialogue
from .loading import find_source, frozen_arrays, load_network, quiet, settings_of
from .task import Batch, Encoded, TaskModel
from .tokens import PROBE, fit_tokenizer, max_positions, vocabulary

#: Sum of −log p, tokens, right tokens.
NUM_OUTPUTS = 3

M = TypeVar("M", bound="AnswerModel")

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, eq=False)
class AnswerModel(TaskModel):
    """A model whose answers are texts."""

    def encode_dialogue(self, row: Dialogue, max_length: int) -> Encoded:
        """One example as ids, without its options."""
        raise NotImplementedError

    def prompts(self, encoded: Sequence[Encoded]) -> Batch:
        """What a generation starts from, as keyword arguments of `generate`."""
        raise NotImplementedError

    def encode_rows(self, rows: Iterable[Dialogue], max_length: int) -> list[Encoded]:
        """Ids of each example, of each of its options where the task chooses, and the answer as text."""
        most = min(max_length, self.max_positions)
        encoded = []
        for row in rows:
            item = self.encode_dialogue(row, most)
            item["reference"] = row.answer
            if self.task.multiple_choice != "none":
                options = [Dialogue((*row.turns[:-1], ("assistant", option))) for option in row.options]
                item["options"] = [self.encode_dialogue(option, most) for option in options]
            encoded.append(item)
        return encoded

    def known_ids(self) -> set[int]:
        """Ids that the server knows of: special ones, and those of its own words around an empty prompt."""
        empty = self.encode_dialogue(Dialogue((("user", ""), ("assistant", ""))), self.max_positions)
        return {*self.processor.all_special_ids, *empty["input_ids"], *empty.get("target_ids", ())}

    def task_loss(self, outputs: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Mean of −log p over an example's answer tokens; `mean` or `sum` over the examples.

        Args:
            outputs: `(n, 3)` from `forward`.
            labels: Not looked at: the answers are in the batch.
            reduction: `mean` or `sum`.
        """
        losses = outputs[:, 0] / outputs[:, 1]
        return losses.mean() if reduction == "mean" else losses.sum()

    def judged(self, outputs: np.ndarray, encoded: Sequence[Encoded], labels: np.ndarray, size: int) -> np.ndarray:
        """Outputs `(n, 7)`: those of `forward`; matched, generated; chosen rightly, had a choice."""
        verdicts = np.zeros((len(encoded), 4), np.float32)
        if self.task.generate_examples:
            first = encoded[: self.task.generate_examples]
            verdicts[: len(first), 0] = self._matches(first, size)
            verdicts[: len(first), 1] = 1.0
        choices = [index for index, label in enumerate(labels) if label >= 0 and encoded[index].get("options")]
        if self.task.multiple_choice != "none" and choices:
            chosen = self._chosen([encoded[index]["options"] for index in choices], size)
            verdicts[choices, 2] = chosen == labels[choices]
            verdicts[choices, 3] = 1.0
        return np.concatenate([outputs, verdicts], axis=1)

    def _chosen(self, options: Sequence[Sequence[Encoded]], size: int) -> np.ndarray:
        """The likeliest option of each question, by the sum or the mean of log p over its tokens."""
        flat = [(question, option) for question, found in enumerate(options) for option in range(len(found))]
        flat.sort(key=lambda place: self.length(options[place[0]][place[1]]), reverse=True)
        scores = [np.full(len(found), np.inf) for found in options]
        for start in range(0, len(flat), size):
            places = flat[start : start + size]
            batch = self._on_device(self.collate([options[question][option] for question, option in places]))
            found = self.forward(batch).float().cpu().numpy()
            cost = found[:, 0] / found[:, 1] if self.task.multiple_choice == "mean" else found[:, 0]
            for (question, option), value in zip(places, cost, strict=True):
                scores[question][option] = value
        return np.array([int(score.argmin()) for score in scores])

    def _matches(self, encoded: Sequence[Encoded], size: int) -> np.ndarray:
        """Whether each generated answer is the reference."""
        matched = np.zeros(len(encoded), bool)
        network: Any = self.model
        order = sorted(range(len(encoded)), key=lambda index: self.length(encoded[index]), reverse=True)
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = self._on_device(self.prompts([encoded[index] for index in indices]))
            with self._generation(), quiet():
                ids = network.generate(**batch)
            # an encoder-decoder's output is the answer alone
            begin = 0 if network.config.is_encoder_decoder else batch["input_ids"].shape[1]
            texts = self.processor.batch_decode(ids[:, begin:], skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                matched[index] = is_match(text, encoded[index]["reference"], self.task.compare)
        return matched

    @contextmanager
    def _generation(self) -> Iterator[None]:
        """Generate by the run's settings alone, whatever the model's folder says of sampling or penalties."""
        network: Any = self.model
        own, tokenizer = network.generation_config, self.processor
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        stops = {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
        network.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=self.task.beams,
            max_new_tokens=self.task.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(stops) or None,
            decoder_start_token_id=getattr(network.config, "decoder_start_token_id", None),
        )
        try:
            yield
        finally:
            network.generation_config = own

    def _on_device(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def _reading(self) -> list[Any]:
        template = getattr(self.processor, "chat_template", None)
        tokenizer = [*vocabulary(self.processor), self._ids(PROBE, special=True), self._ids(PROBE), template]
        return [*tokenizer, self.max_positions, settings_of(self.model.config)]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        found: list[int] = self.processor(text, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        return found


def is_match(text: str, reference: str, compare: str) -> bool:
    """Whether two answers are the same: as texts but for case and white space, or in their last number.

    Args:
        text: The generated answer.
        reference: The right one.
        compare: `text` or `number`; a text without a number matches nothing.
    """
    if compare == "number":
        numbers = [_NUMBER.findall(answer) for answer in (text, reference)]
        if not all(numbers):
            return False
        first, second = (float(found[-1].replace(",", "")) for found in numbers)
        return first == second
    return " ".join(text.casefold().split()) == " ".join(reference.casefold().split())


def answer_outputs(logits: torch.Tensor, targets: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
    """Outputs `(n, 3)`, float32: Σ −log p, tokens and right tokens of each answer.

    Args:
        logits: `(n, length, vocabulary)`, each for the target at its place.
        targets: Ids `(n, length)`.
        is_answer: Bool `(n, length)`; only these places count, and only their logits are taken to float32.
    """
    chosen, wanted = logits[is_answer], targets[is_answer]
    losses = functional.cross_entropy(chosen.float(), wanted, reduction="none")
    each = torch.zeros(targets.shape, device=losses.device).masked_scatter(is_answer, losses)
    right = torch.zeros_like(is_answer).masked_scatter(is_answer, chosen.argmax(-1) == wanted)
    return torch.stack([each.sum(-1), is_answer.sum(-1).float(), right.sum(-1).float()], dim=-1)


def load_answering(kind: type[M], config: RunConfig, auto: Any, settings: Any, tokenizer: Any) -> M:
    """The model with its weights, all frozen.

    Args:
        kind: The class of the result.
        config: The run's configuration.
        auto: The class that loads the network, one of transformers' `AutoModel...`.
        settings: The model's own configuration.
        tokenizer: The model's tokenizer.

    Raises:
        ConfigError: As `load_network`; or the checkpoint lacks weights, and no head could start anew.
    """
    fit_tokenizer(settings, tokenizer)
    model, new = load_network(config, auto, settings)
    if new:
        raise ConfigError(
            f"the weights of {find_source(config)} do not cover a {config.task.kind} model",
            got=f"nothing that fits {len(new)} arrays, the first being {min(new)}",
            cause="the model is of another kind, an encoder perhaps",
            remedy="use a model that was made to write texts, or another task.kind",
            public="the model's weights do not fit the kind of task",
        )
    model.requires_grad_(False)
    return kind(
        model=model.eval(),
        processor=tokenizer,
        head_modules=(),
        task=config.task,
        num_outputs=NUM_OUTPUTS,
        max_positions=max_positions(model, tokenizer),
        frozen=frozen_arrays(model),
    )
