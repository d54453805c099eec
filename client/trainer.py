"""What a site does when it is asked: introduce itself, sketch, build bases, train, evaluate.

`Trainer` is the seam: `service.py` speaks to it and to nothing else. `LocalTrainer` does the work.
"""

from __future__ import annotations

import platform
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import giva_core
from giva_core import bases as bases_module
from giva_core import metrics
from giva_core.calibration import Sketches, Stage
from giva_core.config import RunConfig
from giva_core.errors import ConfigError, DataError
from giva_core.protocol import Hello, TrainRequest, arrays_digest
from giva_core.sketch import sketch_pass
from giva_core.types import Arrays, ClientUpdate, ModelSchema, SiteEvaluation

from .backbone import get_backbone
from .data import RowStream
from .frozen import FrozenHead, can_freeze, head_inputs
from .policy import Policy
from .site import SiteSettings
from .training import (
    EncodedData,
    OnStep,
    Task,
    batches,
    collate,
    examples_in_round,
    judged,
    predict,
    train_round,
    use_threads,
)

_SESSIONS = 256  # simulated sites whose trainers stay in memory
_sessions: OrderedDict[tuple[Any, ...], LocalTrainer] = OrderedDict()


def library_versions() -> str:
    """The versions that decide results, as one text."""
    names = ("torch", "transformers", "numpy", "flwr")
    own = [f"fedgiva {giva_core.__version__}", f"python {platform.python_version()}"]
    return ", ".join([*own, *(f"{name} {version(name)}" for name in names)])


class Trainer(Protocol):
    """What a site can be asked."""

    @property
    def name(self) -> str:
        """The site's name."""

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""

    @property
    def policy(self) -> Policy | None:
        """What the server may ask; None where server and site are one machine."""

    @property
    def schema(self) -> ModelSchema:
        """What the model trains and sends."""

    def hello(self) -> Hello:
        """Introduce the site."""

    def initial_state(self) -> Arrays:
        """The starting values of everything trained but the vectors."""

    def calibrate(self, stage: Stage, previous: Sketches | None, state: Arrays) -> tuple[Sketches, int, float]:
        """Sketch the gradient: sketches by layer, example count, mean loss."""

    def build_bases(self, sketches: Sketches, coordinates: Sketches | None) -> str:
        """Build the bases from the federation's sketch and return their digest."""

    def train(self, request: TrainRequest) -> ClientUpdate:
        """Train locally."""

    def evaluate(self, arrays: Arrays, bases_digest: str) -> SiteEvaluation:
        """Evaluate the global arrays on the site's evaluation rows."""


class LocalTrainer:
    """A site whose model and data are in this process.

    Args:
        site: The site.
        config: The run's configuration.

    Raises:
        GivaError: The site's policy does not allow the run, or its model or its rows cannot be used.
    """

    def __init__(self, site: SiteSettings, config: RunConfig) -> None:
        self.site, self._config = site, config
        if site.policy:
            site.policy.check_run(config)
        use_threads(config.train.num_threads)
        self.backbone = get_backbone(config, site.device)
        self.on_step: OnStep = lambda step, steps: None
        self._check_model()
        if site.policy:
            site.policy.check_sketches(self.backbone.schema, config.bases)
        self._train = self._rows(site.train_path)
        if site.policy:
            used = examples_in_round(len(self._train), config.train)
            sketched = self._calibration_examples if config.is_calibrated else None
            site.policy.check_rows(len(self._train), sketched, used)
            if config.is_calibrated:
                site.policy.check_sketches(self.backbone.schema, config.bases, self._calibration_vectors())
        self._head_inputs: dict[str, EncodedData] = {}
        self._eval = self._rows(site.eval_path) if site.eval_path else None
        if site.policy and self._eval and len(self._eval) < site.policy.min_eval_examples:
            self._eval = None

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self._config

    @property
    def policy(self) -> Policy | None:
        """What the server may ask; None where server and site are one machine."""
        return self.site.policy

    def _check_model(self) -> None:
        wanted, found = self.site.model_digest, self.backbone.model_digest
        if wanted and wanted != found:
            raise ConfigError(
                "the base model is not the one that the site file names",
                got=f"{found[:12]}…",
                expected=f"{wanted[:12]}…",
                cause="its files were changed, or the digest was taken for other settings of [model] and [task]",
                remedy="put the model back, or correct its digest in the site file",
                public="the site's model has another digest than its settings say",
            )

    def _rows(self, path: Path) -> EncodedData:
        """The tokenised rows of a file: those kept with the model, if the file is still the same."""
        task, model, kept = self.config.task, self.backbone.task, self.backbone.rows
        key = (path, _state_of(path), self.site.data)
        if key not in kept:
            rows = RowStream(path, task, self.site.data)  # encoded as they come: image files together are large
            features = model.encode_rows(rows, task.max_length)
            kept[key] = EncodedData(features, rows.labels, [model.length(item) for item in features])
            while len(kept) > 2 * _SESSIONS:
                kept.popitem(last=False)
        return kept[key]

    @property
    def schema(self) -> ModelSchema:
        """What the model trains and sends."""
        return self.backbone.schema

    def hello(self) -> Hello:
        """Introduce the site: counts, schema and digests."""
        return Hello(
            site=self.site.name,
            num_train=len(self._train),
            num_eval=len(self._eval) if self._eval else 0,
            schema=self.backbone.schema,
            model_digest=self.backbone.model_digest,
            state_digest=arrays_digest(self.backbone.initial_state),
            frozen_digest=self.backbone.frozen_digest,
            config_digest=self.config.digest(),
            versions=library_versions(),
            device=self.backbone.device.type,
        )

    def initial_state(self) -> Arrays:
        """The starting values of head and other method's matrices."""
        return self.backbone.initial_state

    def calibrate(self, stage: Stage, previous: Sketches | None, state: Arrays) -> tuple[Sketches, int, float]:
        """Sketch the gradient of the mean loss over the calibration batches.

        Args:
            stage: The pass.
            previous: The federation's aggregate of the pass before.
            state: The head to calibrate with.

        Returns:
            Quantised sketches by layer, the number of calibration examples, the mean loss.
        """
        backbone, giva = self.backbone, self.config.giva
        backbone.use("")
        backbone.write(state)
        schema = backbone.schema
        multipliers = backbone.multipliers(stage, previous)
        task = backbone.task

        def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
            logits = task.forward(batch)
            return task.task_loss(logits, batch["labels"], reduction="sum"), len(batch["labels"])

        result = sketch_pass(task.model, schema.layers, multipliers, stage.side, self.calibration_batches(), loss_fn)
        sketches = {name: bases_module.quantise(array, giva.sketch_bits) for name, array in result.arrays.items()}
        return sketches, result.num_examples, result.mean_loss

    def calibration_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The first batches of a shuffle that depends on the seed alone: every pass sees the same examples."""
        giva = self.config.giva
        subset = self._train.take(self._calibration_choice())
        for indices in batches(subset, giva.calibration_batch_size, (giva.seed, 0)):
            yield collate(self.backbone.task, subset, indices, self.backbone.device)

    def _calibration_vectors(self) -> int:
        """How many outer products the calibration gradient is a sum of, at least."""
        chosen = [self._train.features[index] for index in self._calibration_choice()]
        return self.backbone.task.gradient_terms(chosen, [layer.name for layer in self.backbone.schema.layers])

    def _calibration_choice(self) -> np.ndarray:
        """The rows of a shuffle that depends on the seed alone: every pass sees the same examples."""
        return np.random.default_rng([self.config.giva.seed, 0]).permutation(len(self._train))[
            : self._calibration_examples
        ]

    @property
    def _calibration_examples(self) -> int:
        giva = self.config.giva
        return min(len(self._train), giva.calibration_batches * giva.calibration_batch_size)

    def build_bases(self, sketches: Sketches, coordinates: Sketches | None) -> str:
        """Build the bases from the federation's sketch, keep them, and return their digest."""
        return self.backbone.build(sketches, coordinates).digest

    def train(self, request: TrainRequest) -> ClientUpdate:
        """Train `request.train_names` for the configured local epochs, from the global arrays."""
        started = time.perf_counter()
        self.backbone.use(request.bases_digest)
        self.backbone.write(request.arrays)
        self.backbone.task.checkpoint_activations(self.config.train.gradient_checkpointing)
        vectors, others = self.backbone.parameters(request.train_names)
        task, data = self._task_for("train", self._train, request.bases_digest, trained=request.train_names)
        result = train_round(
            task,
            data,
            self.config.train,
            vectors=vectors,
            others=others,
            server_round=request.server_round,
            total_rounds=request.total_rounds,
            seed=self.config.giva.seed,
            proximal_mu=request.proximal_mu,
            is_head_round=request.is_head_round,
            dropout=not self._is_head_alone(request.bases_digest, request.train_names),
            label=f"{self.site.name} round {request.server_round}",
            on_step=self.on_step,
        )
        return ClientUpdate(
            arrays=self.backbone.read(request.train_names),
            num_examples=len(self._train),
            num_steps=result.num_steps,
            train_loss=result.mean_loss,
            bases_digest=request.bases_digest,
            seconds=time.perf_counter() - started,
        )

    def _task_for(
        self, split: str, data: EncodedData, bases_digest: str, trained: Sequence[str] = ()
    ) -> tuple[Task, EncodedData]:
        """The model and the rows; or, where no adapter is at work, the head and its kept inputs."""
        backbone = self.backbone
        is_head_alone = self._is_head_alone(bases_digest, trained)
        if not is_head_alone or not can_freeze(backbone.task, backbone.trained_modules, len(data)):
            self._head_inputs.clear()
            return backbone.task, data
        if split not in self._head_inputs:
            self._head_inputs[split] = head_inputs(backbone.task, data, self.config.train)
        return FrozenHead(backbone.task), self._head_inputs[split]

    def _is_head_alone(self, bases_digest: str, trained: Sequence[str] = ()) -> bool:
        """Whether no adapter is at work. The frozen model then computes without dropout, kept inputs or not."""
        adapter = self.backbone.schema.adapter
        return not bases_digest and (not any(name in adapter for name in trained) if trained else not adapter)

    def evaluate(self, arrays: Arrays, bases_digest: str) -> SiteEvaluation:
        """Evaluate the global arrays; the counts leave only where the run shares them and the site allows it."""
        if self._eval is None:
            raise DataError("this site has no evaluation rows", public="no evaluation rows")
        self.backbone.use(bases_digest)
        self.backbone.write(arrays)
        task, data = self._task_for("eval", self._eval, bases_digest)
        outputs, loss = predict(task, data, self.config.train)
        outputs = judged(self.backbone.task, outputs, self._eval, self.config.train)
        values, counts = metrics.site_metrics(self.config.task.kind, outputs, self._eval.labels)
        is_shared = self.config.task.share_counts
        if self.policy:
            counts = metrics.without_few(self.config.task.kind, counts, self.policy.min_eval_examples)
            values = metrics.from_counts(self.config.task.kind, counts)
            released = self.policy.released(values)
            # every metric follows from the counts
            is_shared = is_shared and self.policy.allow_share_counts and len(released) == len(values)
            values = released
        return SiteEvaluation(len(self._eval), loss, values, counts if is_shared else {})


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is written anew; nothing for one that is not there, which its reader will tell."""
    try:
        status = path.stat()
    except OSError:
        return ()
    own = (status.st_mtime_ns, status.st_size, status.st_ino)
    if not path.is_dir():
        return own
    inside = []  # of a folder of images
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # taken away meanwhile
            inside.append(file.lstat())
    return (*own, len(inside), sum(found.st_size for found in inside), max((f.st_mtime_ns for f in inside), default=0))


def get_trainer(site: SiteSettings, config: RunConfig) -> LocalTrainer:
    """The site's trainer in this process, made at the first call."""
    # rows that were changed or withdrawn have to be read anew
    key = (site, config.to_json(), *(_state_of(path) for path in (site.train_path, site.eval_path) if path))
    if _sessions and next(iter(_sessions))[1] != key[1]:
        _sessions.clear()  # another run: the model that its sites hold on to has had its time, unless it is the same
    if key not in _sessions:
        _sessions[key] = LocalTrainer(site, config)
        while len(_sessions) > _SESSIONS:
            _sessions.popitem(last=False)
    _sessions.move_to_end(key)
    use_threads(config.train.num_threads)  # the message before may have been another run's
    return _sessions[key]


def drop_trainers() -> None:
    """Forget every site."""
    _sessions.clear()
