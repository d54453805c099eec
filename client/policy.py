"""What a site lets a server ask of it. The run's configuration is the server's word; these limits are not.

They keep what leaves the site a mean over enough examples, and the calibration sketches a small part of the gradient:
a layer's gradient `G (d_out, d_in)` is known to whoever has `min(d_out, d_in)` independent columns of `Gᵀ M` or `G M`.
A limit counts within one run; that the same server starts many runs is the operator's to notice.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, time
from typing import TYPE_CHECKING

from giva_core.config import METHODS, TASKS, GivaConfig, RunConfig
from giva_core.errors import ConfigError, DataError, GivaError, ProtocolError
from giva_core.settings import Section, option

if TYPE_CHECKING:
    from giva_core.types import ModelSchema

#: Every metric that an evaluation has, over all kinds of tasks.
METRICS = (
    *("accuracy", "macro_f1", "mcc", "micro_f1", "subset_accuracy", "mse", "pearson"),
    *("perplexity", "token_accuracy", "exact_match", "choice_accuracy"),
)
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


_MOST_POWER_PASSES = 4  # each is two more sketches; more gain nothing


class PolicyError(GivaError):
    """The site's policy does not allow what the server asks for."""

    kind = "policy"


@dataclass(frozen=True)
class Policy(Section):
    """A site's limits: the table `[policy]` of its site file."""

    _prefix = "policy."
    methods: tuple[str, ...] = option(("giva", "head"), "methods that this site takes part in")
    tasks: tuple[str, ...] = option(TASKS, "kinds of tasks that this site takes part in")
    max_rank: int = option(
        64, "highest rank of bases, or of LoRA's matrices; vera and randlora have no such limit", minimum=1
    )
    max_local_epochs: float = option(5.0, "most passes over the site's data in a round", above=0.0)
    max_rounds: int = option(200, "most rounds of a run, head rounds among them", minimum=1)
    hours: str = option("", "local time in which tasks are begun, as 20:00-06:00; empty: always")
    metrics: tuple[str, ...] = option(METRICS, "metrics that may leave; mean loss and example count always do")
    allow_modules_to_save: bool = option(False, "further modules may be trained whole and sent")
    allow_share_counts: bool = option(False, "counts by class may leave, where the run asks for them")
    allow_target_expressions: bool = option(
        False, "giva.target-modules may be a regular expression, which a server can make run for ever"
    )
    allow_model_hub: bool = option(False, "a model's path may be a hub id, where the run allows it too")
    max_sketch_share: float = option(
        0.5,
        "most columns of a layer's sketch, over all passes, as a share of min(d_out, d_in, calibration tokens); random "
        "bases: most rows, as a share of min(d_out, d_in)",
        minimum=0.0,
    )
    max_generated_tokens: int = option(
        100_000, "most tokens of an evaluation's generated answers: examples x tokens x beams", minimum=0
    )
    min_train_examples: int = option(8, "fewest training rows of this site", minimum=0)
    min_calibration_examples: int = option(8, "fewest examples in a calibration sketch", minimum=0)
    min_eval_examples: int = option(8, "with fewer evaluation rows the site says that it has none", minimum=0)
    min_round_examples: int = option(8, "fewest examples that a round's update comes from", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in (("methods", METHODS), ("tasks", TASKS), ("metrics", METRICS)):
            if unknown := sorted(set(getattr(self, key)) - set(known)):
                raise ConfigError(
                    f"policy.{key} names what there is not", got=", ".join(unknown), expected=f"of {', '.join(known)}"
                )
        if self.hours and not _HOURS.fullmatch(self.hours):
            raise ConfigError("policy.hours is no span of time", got=repr(self.hours), expected="e.g. 20:00-06:00")

    def check_run(self, config: RunConfig) -> None:
        """Refuse a run by its configuration alone, before a model is loaded or a row is read."""
        giva, train, rounds = config.giva, config.train, config.rounds
        # their rank is no measure of what they train: randlora's grows as it falls. Who allows them allows any
        rank = 0 if config.method in ("vera", "randlora") else config.rank
        task = config.task
        generated = task.generate_examples * task.max_new_tokens * task.beams
        asked = (
            (config.method in self.methods, f"the method {config.method}", "methods"),
            (config.task.kind in self.tasks, f"the task {config.task.kind}", "tasks"),
            (not giva.modules_to_save or self.allow_modules_to_save, "giva.modules-to-save", "allow-modules-to-save"),
            (rank <= self.max_rank, f"rank {rank}", "max-rank"),
            (giva.power_passes <= _MOST_POWER_PASSES, f"{giva.power_passes} power passes", "max-sketch-share"),
            (
                giva.target_modules == "all-linear"
                or not isinstance(giva.target_modules, str)
                or self.allow_target_expressions,
                "a regular expression as giva.target-modules",
                "allow-target-expressions",
            ),
            (
                generated <= self.max_generated_tokens,
                f"up to {generated} generated tokens in an evaluation",
                "max-generated-tokens",
            ),
            (train.local_epochs <= self.max_local_epochs, f"{train.local_epochs:g} local epochs", "max-local-epochs"),
            (
                train.warm_head_epochs <= self.max_local_epochs,
                f"{train.warm_head_epochs:g} epochs in a head round",
                "max-local-epochs",
            ),
            (
                rounds.head_rounds + rounds.num_rounds <= self.max_rounds,
                f"{rounds.head_rounds + rounds.num_rounds} rounds",
                "max-rounds",
            ),
        )
        for is_allowed, what, key in asked:
            if not is_allowed:
                raise _refusal(what, key)

    def check_hours(self, now: datetime) -> None:
        """Refuse a task that would begin outside the site's hours; a span may go over midnight."""
        if not (found := _HOURS.fullmatch(self.hours)):
            return
        first_hour, first_minute, last_hour, last_minute = map(int, found.groups())
        start, end, clock = time(first_hour, first_minute), time(last_hour, last_minute), now.time()
        is_open = start <= clock < end if start < end else clock >= start or clock < end
        if not is_open:
            raise _refusal("work at this time of day", "hours")

    def check_sketches(self, schema: ModelSchema, giva: GivaConfig, vectors: float = math.inf) -> None:
        """Refuse sketches that together could give a layer's whole gradient away.

        The rank of a gradient `G = Σ_t δ_t x_tᵀ` is at most the number of its terms. A sketch of as many columns spans
        the layer's inputs, and so the tokens' embeddings, from which texts can be read (Petrov et al., "DAGER: Exact
        Gradient Inversion for Large Language Models", arXiv:2405.15586).

        Args:
            schema: The layers.
            giva: The run's plan.
            vectors: Terms of the sum: calibration tokens, or examples where the head reads one token each; by default
                unknown, as they are before a row is read.
        """
        from giva_core import calibration

        plan = calibration.stages(giva)
        for layer, r in zip(schema.layers, schema.ranks, strict=True):
            # without a calibration A is the seed's, and λ_s the server's: r rounds may show r columns of the gradient
            columns = Counter({} if plan else {"output": r})
            for stage in plan:
                columns[stage.side] += calibration.width(stage, layer, r, giva)
            if max(columns.values()) > self.max_sketch_share * min(layer.d_out, layer.d_in, vectors):
                sketches = (
                    "sketches as wide as giva.rank, giva.oversampling and giva.power-passes make them, of so few "
                    "calibration tokens"
                )
                raise _refusal(sketches if plan else "bases as wide as giva.rank makes them", "max-sketch-share")

    def check_rows(self, num_train: int, calibration_examples: int | None, round_examples: int) -> None:
        """Refuse where too few examples would stand behind what leaves: rows, those of a sketch, those of a round.

        A run without calibration has no examples of a sketch: None.
        """
        for count, key in (
            (num_train, "min-train-examples"),
            (calibration_examples, "min-calibration-examples"),
            (round_examples, "min-round-examples"),
        ):
            least = getattr(self, key.replace("-", "_"))
            if count is not None and count < least:
                raise DataError(
                    "too few examples would stand behind what leaves this site",
                    got=count,
                    expected=f"{key} = {least}",
                    cause="a small file, or small batches or few steps in the run's configuration",
                    remedy=f"have the run use more examples, or lower {key} in the site file",
                    public=f"fewer examples than the site's {key}",
                )

    def check_calibration(self, stage: str, asked: int, giva: GivaConfig) -> None:
        """Refuse a calibration question beyond the plan.

        The multipliers of a later pass come from the server, which could otherwise ask for the gradient column by
        column.

        Args:
            stage: The stage asked for.
            asked: Different questions of this stage in this run, with this one.
            giva: The run's plan.
        """
        from giva_core import calibration

        if asked > [planned.name for planned in calibration.stages(giva)].count(stage):
            raise ProtocolError(
                "more calibration questions than the run's plan has",
                got=f"{asked} of the stage {stage}",
                remedy="start a new run",
                public="more calibration questions than planned",
            )

    def check_rounds(self, asked: int, what: str = "rounds") -> None:
        """Refuse to train, or to evaluate, more often in a run than `max_rounds`, whatever its configuration said."""
        if asked > self.max_rounds:
            raise _refusal(f"{asked} {what}", "max-rounds")

    def released(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics that may leave."""
        return {name: value for name, value in metrics.items() if name in self.metrics}


def _refusal(what: str, key: str) -> PolicyError:
    return PolicyError(
        f"the run asks for {what}, which this site's policy does not allow",
        cause="the run's configuration is the server's word",
        remedy=f"change the run, or set policy.{key} in the site file",
        public=f"the site's {key} does not allow {what}",
    )
