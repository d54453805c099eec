"""Which settings fit together; each by itself is checked where it is made (`settings`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .errors import ConfigError
from .task_config import ANSWER_TASKS, LEAST_LENGTH

if TYPE_CHECKING:
    from .config import RunConfig


def check_together(run: RunConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: Naming the first that do.
    """
    if run.rounds.mode != "fedavg" and run.method != "giva":
        raise ConfigError(
            f"rounds.mode = {run.rounds.mode} averages GiVA's vectors",
            got=f"method = {run.method}",
            expected="method = giva",
        )
    is_exact = run.rounds.mode == "exact" or run.method == "fedex-lora"
    if is_exact and run.strategy.name not in ("fedavg", "fedprox"):
        what = "method = fedex-lora" if run.method == "fedex-lora" else "rounds.mode = exact"
        raise ConfigError(
            f"{what} keeps the exact mean of the sites' products",
            got=f"strategy.name = {run.strategy.name}",
            expected="fedavg or fedprox",
            remedy="choose method lora, or mode fedavg, with this strategy",
        )
    if run.giva.bases == "random" and run.method == "lora-xs" and run.lora_xs.bases == "gradient":
        raise ConfigError(
            "lora_xs.bases = gradient takes singular vectors of the gradient",
            got="giva.bases = random",
            expected="giva.bases = gradient",
            remedy="leave giva.bases out, or choose lora_xs.bases = weight",
        )
    if run.giva.bases == "random" and run.giva.init != "rand":
        raise ConfigError(
            f"giva.init = {run.giva.init} makes B of the gradient",
            got="giva.bases = random, which takes none",
            expected="giva.init = rand",
            remedy="set giva.bases = gradient, or giva.init = rand",
        )
    if run.method == "full" and (run.model.dtype != "float32" or run.giva.dropout):
        raise ConfigError(
            "method = full trains the weights themselves, in float32, and has no adapter to drop inputs of",
            got=f"model.dtype = {run.model.dtype}, giva.dropout = {run.giva.dropout:g}",
            expected="float32 and 0",
        )
    if run.rounds.quorum > run.rounds.min_sites:
        raise ConfigError(
            "a round with the fewest sites could never reach its quorum",
            got=f"quorum {run.rounds.quorum}, min-sites {run.rounds.min_sites}",
            expected="rounds.quorum <= rounds.min-sites",
            remedy="raise rounds.min-sites; for a run with one site set both to 1",
        )
    is_headless = run.task.kind in ANSWER_TASKS and not run.giva.modules_to_save
    if is_headless and (run.method == "head" or run.rounds.head_rounds):
        raise ConfigError(
            f"a {run.task.kind} task has no head of its own to train",
            got=f"method {run.method}, {run.rounds.head_rounds} head rounds",
            remedy="set rounds.head-rounds = 0 and another method",
        )
    if run.task.kind in ANSWER_TASKS and run.task.max_length < LEAST_LENGTH:
        raise ConfigError(
            "task.max-length leaves no room for prompt and answer",
            got=run.task.max_length,
            expected=f"at least {LEAST_LENGTH}",
        )
    if run.task.kind == "seq2seq" and run.task.prompt_format == "chat":
        raise ConfigError(
            "task.kind = seq2seq reads plain prompts",
            got="task.prompt-format = chat",
            expected="plain",
            remedy="use task.kind = causal-lm for chats",
        )
    if run.task.prompt_template and "{prompt}" not in run.task.prompt_template:
        raise ConfigError(
            "task.prompt-template has no place for the prompt",
            got=repr(run.task.prompt_template),
            expected="a text with {prompt} in it",
        )
    if len(set(run.task.labels)) != len(run.task.labels):
        raise ConfigError("task.labels names a label twice", got=sorted(run.task.labels), expected="distinct labels")
    if run.strategy.options:
        try:
            ok = isinstance(json.loads(run.strategy.options), dict)
        except json.JSONDecodeError:
            ok = False
        if not ok:
            raise ConfigError(
                "strategy.options is not a JSON object", got=run.strategy.options, expected='e.g. {"eta": 0.1}'
            )
