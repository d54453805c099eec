"""Texts that go on from a prompt: the kind `causal-lm`.

Prompts and answers are tokenised apart, so that what is learned ends and begins where a generation does. A plain
example is the prompt in its template, the answer, and the end token. A chat is written by the tokenizer's own template;
what each of the assistant's messages adds to it, up to the end token, is learned. The loss is on the answers alone
(arXiv:2604.21901, §5, found that better than on all tokens).

Too long an example loses the beginning of its prompt first, and the end of its answer only where that alone is longer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..config import RunConfig
from ..errors import ConfigError
from ..rows import Dialogue
from .answers import AnswerModel, answer_outputs, load_answering
from .loading import load_processor, load_settings
from .task import Batch, Encoded
from .tokens import attention, padded


@dataclass(frozen=True, eq=False)
class CausalLM(AnswerModel):
    """A decoder that writes on; an example is `input_ids`, and `answers`: 1 for each token to be learned."""

    def encode_dialogue(self, row: Dialogue, max_length: int) -> Encoded:
        """Ids of the whole dialogue, and which of them are answers."""
        segments = self._chat(row) if self.task.prompt_format == "chat" else self._plain(row)
        ids = [token for tokens, _ in segments for token in tokens]
        answers = [int(is_answer) for tokens, is_answer in segments for _ in tokens]
        last = _last_answer(answers)
        opening = 1 if ids[0] == self.processor.bos_token_id else 0
        cut = max(0, min(len(ids) - max_length, last - opening - 1))
        ids, answers = ids[:opening] + ids[opening + cut :], answers[:opening] + answers[opening + cut :]
        return {"input_ids": ids[:max_length], "answers": answers[:max_length]}

    def collate(self, encoded: Sequence[Encoded], labels: Any = None) -> Batch:
        """`input_ids`, `attention_mask` and `answers`, all `(n, length)`, and `labels` where given."""
        sequences = [item["input_ids"] for item in encoded]
        ids = padded(sequences, self.processor.pad_token_id, self.max_positions)
        batch = {
            "input_ids": ids,
            "attention_mask": attention(sequences, ids.shape[1]),
            "answers": padded([item["answers"] for item in encoded], 0, self.max_positions),
        }
        if labels is not None:
            batch["labels"] = torch.as_tensor(labels)
        return batch

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Outputs `(n, 3)`; logits are computed from the batch's first answer on."""
        ids, is_answer = batch["input_ids"], batch["answers"].bool()
        length = ids.shape[1]
        begin = max(1, int(is_answer.any(0).nonzero()[0]))  # the token before it predicts it
        keep = {"logits_to_keep": length - begin + 1} if self._keeps_some else {}
        network: Any = self.model
        logits = network(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False, **keep).logits
        logits = logits[:, begin - 1 - length : -1]
        return answer_outputs(logits, ids[:, begin:], is_answer[:, begin:])

    def prompts(self, encoded: Sequence[Encoded]) -> Batch:
        """Everything before the last answer, padded on the left, with room for the new tokens."""
        room = max(1, self.max_positions - self.task.max_new_tokens)
        sequences = [item["input_ids"][: _last_answer(item["answers"])][-room:] for item in encoded]
        ids = padded(sequences, self.processor.pad_token_id, room, left=True)
        return {"input_ids": ids, "attention_mask": attention(sequences, ids.shape[1], left=True)}

    def length(self, encoded: Encoded) -> int:
        """Tokens of prompt and answer."""
        return len(encoded["input_ids"])

    def gradient_terms(self, encoded: Sequence[Encoded], layers: Sequence[str]) -> int:
        """Answer tokens, or different tokens of the site's own where these are fewer.

        The last layer's gradient comes from the places that predict an answer's token, and from no other. The first
        layer of a model that turns positions in (RoPE) reads the same vector for the same token, wherever it stands;
        and whoever knows a vector, as the server those of its template, can take it out of a sketch.
        """
        answers = sum(sum(item["answers"]) for item in encoded)
        different = {token for item in encoded for token in item["input_ids"][:-1]}
        return min(answers, len(different - self.known_ids()))

    def _plain(self, row: Dialogue) -> list[tuple[list[int], bool]]:
        (_, prompt), (_, answer) = row.turns
        template = self.task.prompt_template
        prompt_ids = self._ids(template.replace("{prompt}", prompt) if template else f"{prompt}\n", special=True)
        end = self.processor.eos_token_id
        if end is not None and prompt_ids[-1:] == [end]:  # some tokenizers close every text
            prompt_ids = prompt_ids[:-1]
        return [(prompt_ids, False), (self._ids(answer) + ([] if end is None else [end]), True)]

    def _chat(self, row: Dialogue) -> list[tuple[list[int], bool]]:
        messages = [{"role": role, "content": content} for role, content in row.turns]
        segments: list[tuple[list[int], bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], True)
            after = self._render(messages[: index + 1], False)
            if not before.startswith(done) or not after.startswith(before):
                raise ConfigError(
                    "the tokenizer's chat template writes earlier messages anew when later ones come",
                    cause="such a template shows no place where an answer begins",
                    remedy="use chats of one question and answer, another template, or task.prompt-format = plain",
                    public="the tokenizer's chat template cannot be used",
                )
            answer = self._ids(after[len(before) :])
            end = self.processor.eos_token_id
            stop = answer.index(end) + 1 if end in answer else len(answer)
            segments += [(self._ids(before[len(done) :]), False), (answer[:stop], True), (answer[stop:], False)]
            done = after
        return segments

    def _render(self, messages: list[dict[str, str]], opens: bool) -> str:
        try:
            text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        except Exception as error:  # jinja2's own kinds, and what a template raises
            raise ConfigError(
                "the tokenizer has no chat template that fits",
                got=type(error).__name__,
                cause="the tokenizer has none, or its template refuses such a chat, a system message perhaps",
                remedy="set task.prompt-format = plain and task.prompt-template, or use a chat model",
                public="the tokenizer's chat template cannot be used",
            ) from None
        return text

    @cached_property
    def _keeps_some(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters


def _last_answer(answers: Sequence[int]) -> int:
    """Where the last run of ones begins."""
    end = len(answers) - 1 - list(answers)[::-1].index(1)
    while end and answers[end - 1]:
        end -= 1
    return end


def load(config: RunConfig) -> CausalLM:
    """Load a decoder and its tokenizer, all frozen."""
    tokenizer = load_processor(config, AutoTokenizer)
    return load_answering(CausalLM, config, AutoModelForCausalLM, load_settings(config), tokenizer)
