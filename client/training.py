"""The local loop: a model, its batches and a request in; trained arrays out. Knows nothing of Flower or of files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from giva_core.config import TrainConfig
from giva_core.errors import NumericsError

if TYPE_CHECKING:
    from giva_core.models import TaskModel

#: Told after every optimizer step: how many are done, and of how many.
OnStep = Callable[[int, int], None]

_found_threads = 0
_GROUP = 50  # batches that are sorted by length together: enough to save padding, few enough to stay random


class Task(Protocol):
    """What the loop needs of a model: `giva_core.models.TaskModel`, or its head over kept inputs."""

    @property
    def model(self) -> torch.nn.Module:
        """The module whose parameters are trained."""

    @property
    def num_outputs(self) -> int:
        """Outputs C."""

    def collate(self, encoded: Sequence[Any], labels: Any = None) -> dict[str, torch.Tensor]:
        """A batch with its `labels`."""

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits `(n, C)`."""

    def task_loss(self, logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The loss over a batch."""


@dataclass(frozen=True)
class EncodedData:
    """Examples in memory.

    Attributes:
        features: What the task collates: token ids by name, or the head's inputs.
        labels: Their labels.
        lengths: Tokens of each; batches are grouped by it.
    """

    features: Sequence[Any]
    labels: np.ndarray
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.features)

    def take(self, indices: Sequence[int] | np.ndarray) -> EncodedData:
        """Some of the examples."""
        chosen = [int(i) for i in indices]
        return EncodedData([self.features[i] for i in chosen], self.labels[chosen], [self.lengths[i] for i in chosen])


@dataclass(frozen=True)
class LocalResult:
    """What one round of local training came to."""

    num_steps: int
    mean_loss: float


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else Apple's MPS, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def use_threads(number: int) -> None:
    """Let PyTorch compute with so many threads; 0 is what it found before this process was told a number."""
    global _found_threads
    if number or _found_threads:
        _found_threads = _found_threads or torch.get_num_threads()
        torch.set_num_threads(number or _found_threads)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The forward pass's precision: `auto` is bfloat16 on CUDA and none elsewhere."""
    name = config.precision
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return nullcontext() if name == "float32" else torch.autocast(device.type, getattr(torch, name))


def batches(data: EncodedData, batch_size: int, seed: Sequence[int]) -> list[list[int]]:
    """Indices of one epoch's batches: shuffled, then grouped by length to save padding, then the batches shuffled."""
    rng = np.random.default_rng(list(seed))
    order = rng.permutation(len(data))
    made: list[list[int]] = []
    for start in range(0, len(order), batch_size * _GROUP):
        group = sorted(order[start : start + batch_size * _GROUP].tolist(), key=data.lengths.__getitem__, reverse=True)
        made.extend(group[i : i + batch_size] for i in range(0, len(group), batch_size))
    return [made[i] for i in rng.permutation(len(made))]


def rate_factor(progress: float, config: TrainConfig) -> float:
    """Learning rate as a share of its peak, at `progress` in [0, 1] through the whole run.

    Progress, and not a step count, since sites of different sizes take different numbers of steps in a round.
    """
    warmup = config.warmup_fraction
    if progress < warmup:
        return progress / warmup
    if config.schedule == "constant":
        return 1.0
    rest = min(1.0, (progress - warmup) / max(1e-9, 1.0 - warmup))
    return 1.0 - rest if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * rest))


def train_round(
    task: Task,
    data: EncodedData,
    config: TrainConfig,
    *,
    vectors: Sequence[torch.nn.Parameter],
    others: Sequence[torch.nn.Parameter],
    server_round: int,
    total_rounds: int,
    seed: int,
    proximal_mu: float = 0.0,
    is_head_round: bool = False,
    dropout: bool = True,
    label: str = "training",
    on_step: OnStep = lambda step, steps: None,
) -> LocalResult:
    """Train for `config.local_epochs` with a fresh AdamW.

    Args:
        task: The model, already holding the global arrays.
        data: The site's training examples.
        config: The training settings.
        vectors: Parameters trained at `learning_rate`.
        others: Parameters trained at `head_learning_rate`.
        server_round: From 1.
        total_rounds: Rounds over which the learning rate runs.
        seed: The run's seed; batches and dropout follow from it and the round alone.
        proximal_mu: FedProx's mu: adds `mu (w - w_global)` to the gradient.
        is_head_round: Whether this is a head round, which has a learning rate of its own.
        dropout: Whether the model computes as in training, with its dropout.
        label: What the progress bar is called; it shows on terminals only.
        on_step: Told of every step.

    Raises:
        NumericsError: The loss or a gradient left the finite numbers.
    """
    device = next(task.model.parameters()).device
    torch.manual_seed((seed * 1_000_003 + server_round) % 2**63)
    trained = [*vectors, *others]
    anchors = [p.detach().clone() for p in trained] if proximal_mu else []
    head_rate = config.warm_head_learning_rate if is_head_round else 0.0
    groups = [
        (vectors, config.learning_rate, 1e-8),
        (others, head_rate or config.head_learning_rate, config.head_epsilon),
    ]
    optimizer = torch.optim.AdamW(
        [{"params": list(params), "lr": rate, "peak": rate, "eps": eps} for params, rate, eps in groups if params],
        weight_decay=config.weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    total_steps = steps_in_round(len(data), config, is_head_round)

    task.model.train(dropout)
    losses: list[float] = []
    step = 0
    windows = itertools.islice(_windows(data, config, seed, server_round), total_steps)
    for window in tqdm(windows, desc=label, total=total_steps, unit="step", leave=False, disable=None):
        factor = rate_factor((server_round - 1 + (step + 0.5) / total_steps) / total_rounds, config)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        window_loss = _gradient(task, data, window, config, scaler)
        scaler.unscale_(optimizer)
        while scaler.is_enabled() and scaler.get_scale() > 1.0 and not _is_finite(trained):
            # the scale is found by overflowing; a scaler would skip the step, and with it all of a short round
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            window_loss = _gradient(task, data, window, config, scaler)
            scaler.unscale_(optimizer)
        for parameter, anchor in zip(trained, anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=proximal_mu)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm or math.inf)
        _check_finite(window_loss, norm, step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(window_loss)
        step += 1
        on_step(step, total_steps)
    return LocalResult(step, math.fsum(losses) / max(1, len(losses)))


def _gradient(
    task: Task, data: EncodedData, window: list[list[int]], config: TrainConfig, scaler: torch.amp.GradScaler
) -> float:
    """Add up the scaled gradient of the mean loss over one step's batches, and return that loss."""
    device = next(task.model.parameters()).device
    examples = sum(len(indices) for indices in window)
    total = 0.0
    for indices in window:
        batch = collate(task, data, indices, device)
        with autocast(config, device):
            logits = task.forward(batch)
        loss = task.task_loss(logits, batch["labels"], reduction="sum") / examples
        scaler.scale(loss).backward()
        total += float(loss.detach())
    return total


def steps_in_round(num_examples: int, config: TrainConfig, is_head_round: bool = False) -> int:
    """Optimizer steps of one round."""
    epochs = config.warm_head_epochs if is_head_round else config.local_epochs
    steps = math.ceil(epochs * _steps_in_epoch(num_examples, config))
    return min(steps, config.max_local_steps) if config.max_local_steps else steps


def examples_in_round(num_examples: int, config: TrainConfig) -> int:
    """Different examples that one round uses at least: all of them, unless the round ends within its first epoch."""
    steps = min(steps_in_round(num_examples, config, is_head_round) for is_head_round in (False, True))
    if steps >= _steps_in_epoch(num_examples, config):
        return num_examples
    shortest = num_examples - (math.ceil(num_examples / config.batch_size) - 1) * config.batch_size
    return (steps * config.accumulation_steps - 1) * config.batch_size + shortest


def _steps_in_epoch(num_examples: int, config: TrainConfig) -> int:
    return math.ceil(math.ceil(num_examples / config.batch_size) / config.accumulation_steps)


def predict(task: Task, data: EncodedData, config: TrainConfig) -> tuple[np.ndarray, float]:
    """Outputs `(n, C)` in the order of `data`, and the mean loss."""
    outputs = np.zeros((len(data), task.num_outputs), np.float32)
    total = 0.0
    for indices, logits, loss in pass_over(task, data, config):
        outputs[indices] = logits.float().cpu().numpy()
        total += loss
    return outputs, total / len(data)


@torch.no_grad()
def judged(task: TaskModel, outputs: np.ndarray, data: EncodedData, config: TrainConfig) -> np.ndarray:
    """What the metrics are made of: the outputs, and what the kind of task adds to them, by generation for instance."""
    task.model.eval()
    with autocast(config, next(task.model.parameters()).device):
        return task.judged(outputs, data.features, data.labels, 2 * config.batch_size)


@torch.no_grad()
def pass_over(task: Task, data: EncodedData, config: TrainConfig) -> Iterator[tuple[list[int], torch.Tensor, float]]:
    """One forward pass over `data`, longest first: indices, logits and summed loss of each batch."""
    device = next(task.model.parameters()).device
    task.model.eval()
    order = sorted(range(len(data)), key=data.lengths.__getitem__, reverse=True)
    size = 2 * config.batch_size
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        batch = collate(task, data, indices, device)
        with autocast(config, device):
            logits = task.forward(batch)
        yield indices, logits, float(task.task_loss(logits, batch["labels"], reduction="sum"))


def collate(task: Task, data: EncodedData, indices: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch of these examples, on the device."""
    batch = task.collate([data.features[i] for i in indices], data.labels[list(indices)])
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _windows(data: EncodedData, config: TrainConfig, seed: int, server_round: int) -> Iterator[list[list[int]]]:
    """The batches of each optimizer step, epoch after epoch."""
    for epoch in itertools.count():
        epoch_batches = batches(data, config.batch_size, (seed, server_round, epoch))
        for start in range(0, len(epoch_batches), config.accumulation_steps):
            yield epoch_batches[start : start + config.accumulation_steps]


def _is_finite(parameters: Sequence[torch.nn.Parameter]) -> bool:
    found = [p.grad.isfinite().all() for p in parameters if p.grad is not None]
    return not found or bool(torch.stack(found).all())


def _check_finite(loss: float, norm: torch.Tensor, step: int) -> None:
    if math.isfinite(loss) and bool(torch.isfinite(norm)):
        return
    raise NumericsError(
        f"the loss left the finite numbers in local step {step + 1}",
        got=f"loss {loss}, gradient norm {float(norm)}",
        cause="the learning rate is too large, or the weights' type too small",
        remedy="lower train.learning-rate, or use train.precision = float32",
        public=f"loss not finite in local step {step + 1}",
    )
