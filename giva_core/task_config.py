"""The section of what is learned, and the kinds of tasks there are."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import Section, option

TASKS = ("classification", "multilabel", "regression", "causal-lm", "seq2seq", "image-classification")
#: Kinds whose answers are texts: they have no labels, and no head of their own.
ANSWER_TASKS = ("causal-lm", "seq2seq")
#: Tokens that a prompt and its answer need at least.
LEAST_LENGTH = 8


@dataclass(frozen=True)
class TaskConfig(Section):
    """What is learned."""

    _prefix = "task."
    kind: str = option("classification", "kind of the task", choices=TASKS)
    labels: tuple[str, ...] = option((), "the labels, agreed by all sites, in the order of the outputs")
    head: str = option(
        "mean",
        "texts: mean pooling, normalised, then linear, or the model's own head; images have the model's own",
        choices=("mean", "native"),
    )
    max_length: int = option(128, "tokens after which a text is cut", minimum=1, maximum=1 << 20)
    share_counts: bool = option(
        False,
        "sites send the sums that metrics are made of, so that totals are exact; for classes they reveal frequencies",
    )
    prompt_format: str = option(
        "plain",
        "answers: prompt-template and then the completion, or the tokenizer's own chat template",
        choices=("plain", "chat"),
    )
    prompt_template: str = option(
        "", "plain prompts: the text around {prompt}, which has to be in it; empty: the prompt on a line of its own"
    )
    multiple_choice: str = option(
        "none",
        "evaluation rows with options: the likeliest one is the answer, by the sum or the mean over its tokens",
        choices=("none", "sum", "mean"),
    )
    generate_examples: int = option(
        0, "evaluation rows, from the first on, that are answered by generation for exact match; 0: none", minimum=0
    )
    beams: int = option(1, "beams of a generation; 1: greedy", minimum=1, maximum=16)
    max_new_tokens: int = option(32, "most tokens of a generated answer", minimum=1, maximum=1 << 16)
    compare: str = option(
        "text",
        "exact match of the whole text but for case and white space, or of the last number in it",
        choices=("text", "number"),
    )
