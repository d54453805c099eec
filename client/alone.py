"""Training on one machine, without a federation: the same trainer, the same arithmetic, no messages.

A federation of one site with the mode `fedavg` gives the same bytes, since the mean of one update is that update.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from giva_core import aggregate, bases, calibration, checkpoint, protocol
from giva_core.calibration import Sketches, Stage
from giva_core.config import RunConfig
from giva_core.errors import ConfigError
from giva_core.protocol import TrainRequest
from giva_core.types import Arrays, ClientUpdate, SiteEvaluation

from .site import SiteSettings
from .trainer import LocalTrainer


@dataclass(frozen=True)
class LocalRound:
    """One finished round.

    Attributes:
        phase: `head` or `train`.
        round: From 1.
        train_loss: Mean loss over the steps.
        evaluation: On the evaluation rows; None where there are none.
        seconds: Wall time.
    """

    phase: str
    round: int
    train_loss: float
    evaluation: SiteEvaluation | None
    seconds: float


@dataclass(frozen=True)
class LocalRun:
    """What training came to: the trained arrays, the digests, and the rounds."""

    arrays: Arrays
    bases_digest: str
    arrays_digest: str
    rounds: tuple[LocalRound, ...]


def site_at(folder: Path, config: RunConfig) -> SiteSettings:
    """The data in `folder`, as a site of its own."""
    return SiteSettings(folder.resolve().name, folder, config.data, config.train.device)


def train_alone(
    config: RunConfig,
    site: SiteSettings,
    output: Path | None = None,
    watch: Callable[[LocalRound], None] = lambda done: None,
) -> LocalRun:
    """Calibrate, build the bases, train all rounds, and save the adapter.

    Args:
        config: The run's configuration; AdamW starts afresh in each of its rounds, as at a federation's site.
        site: The data.
        output: Folder of the adapter; None saves nothing.
        watch: Told each finished round.

    Raises:
        ConfigError: The configuration asks for what only a federation has.
    """
    if config.rounds.mode != "fedavg" or config.strategy.name != "fedavg":
        raise ConfigError(
            "one machine has nothing to average",
            got=f"mode {config.rounds.mode}, strategy {config.strategy.name}",
            expected="rounds.mode = fedavg, strategy.name = fedavg",
            remedy="use `giva simulate`",
        )
    trainer = LocalTrainer(site, config)
    backbone, schema = trainer.backbone, trainer.schema
    rounds: list[LocalRound] = []
    arrays = trainer.initial_state()

    def one_round(phase: str, number: int, total: int, arrays: Arrays, digest: str) -> Arrays:
        started = time.monotonic()
        factor = "head" if phase == "head" else aggregate.round_factor(config, number)
        names = protocol.trained_names(schema, factor, digest)
        update: ClientUpdate = trainer.train(
            TrainRequest(arrays, number, total, digest, names, is_head_round=phase == "head")
        )
        made = {**arrays, **update.arrays}
        due = number % config.rounds.evaluate_every == 0 or number == total
        evaluation = trainer.evaluate(made, digest) if site.eval_path and due else None
        rounds.append(LocalRound(phase, number, update.train_loss, evaluation, time.monotonic() - started))
        watch(rounds[-1])
        return made

    for number in range(1, config.rounds.head_rounds + 1):
        arrays = one_round("head", number, config.rounds.head_rounds, arrays, "")
    digest = ""
    if config.has_bases:
        digest = trainer.build_bases(*_calibrate(trainer, arrays))
        arrays = {**aggregate.initial_vectors(schema), **arrays}
    for number in range(1, config.rounds.num_rounds + 1):
        arrays = one_round("train", number, config.rounds.num_rounds, arrays, digest)
    if output is not None:
        checkpoint.save_adapter(
            output,
            backbone.bases(digest) if digest else None,
            arrays,
            config,
            model_digest=backbone.model_digest,
            head_modules=backbone.trained_modules,
        )
    return LocalRun(arrays, digest, protocol.arrays_digest(arrays), tuple(rounds))


def _calibrate(trainer: LocalTrainer, state: Arrays) -> tuple[Sketches, Sketches | None]:
    """All passes of the plan, each quantised twice as in a federation: once by the site, once as the aggregate."""
    giva = trainer.config.bases

    def one_pass(number: int, stage: Stage, previous: tuple[Stage, Sketches] | None) -> Sketches:
        own, count, _ = trainer.calibrate(stage, previous[1] if previous else None, state)
        return {name: bases.mean_sketch([sketch], [count], giva.sketch_bits) for name, sketch in own.items()}

    return calibration.run_passes(giva, one_pass)
