"""The local loop, on a model small enough to follow each step by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client import training
from client.training import EncodedData, autocast, batches, collate, pick_device, predict, rate_factor, train_round
from giva_core.config import TrainConfig
from giva_core.errors import NumericsError, public_reason

TOKENS, OUTPUTS = 3, 2
CPU = torch.device("cpu")


class Linear(nn.Module):
    """y = x wᵀ + b, beside a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.4, -0.1]]))
        self.b = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return x @ self.w.T + self.b


class FakeTask:
    """What the loop asks of a `TaskModel`: examples become counts of their tokens, the loss is a squared error."""

    num_outputs = OUTPUTS

    def __init__(self) -> None:
        self.model = Linear()

    def collate(self, features: Sequence[Mapping[str, list[int]]], labels: np.ndarray) -> dict[str, Tensor]:
        counts = [[f["input_ids"].count(token) for token in range(TOKENS)] for f in features]
        return {"x": torch.tensor(counts, dtype=torch.float32), "labels": torch.tensor(labels, dtype=torch.float32)}

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(batch["x"])

    def task_loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        losses = (logits.float() - labels).square().sum(1)
        return losses.sum() if reduction == "sum" else losses.mean()


def toy_data(count: int = 7, seed: int = 0) -> EncodedData:
    rng = np.random.default_rng(seed)
    features = [{"input_ids": rng.integers(0, TOKENS, size=1 + i % 4).tolist()} for i in range(count)]
    return EncodedData(
        features, rng.normal(size=(count, OUTPUTS)).astype(np.float32), [len(f["input_ids"]) for f in features]
    )


def plain(**changes: Any) -> TrainConfig:
    """One constant rate, nothing clipped, nothing decayed."""
    settings: dict[str, Any] = {
        "learning_rate": 0.01,
        "head_learning_rate": 0.01,
        "weight_decay": 0.0,
        "batch_size": 2,
        "clip_norm": 0.0,
        "warmup_fraction": 0.0,
        "schedule": "constant",
    }
    return TrainConfig(**{**settings, **changes})


def train(
    config: TrainConfig, data: EncodedData | None = None, task: FakeTask | None = None, **changes: Any
) -> tuple[Linear, training.LocalResult]:
    task = task or FakeTask()
    settings: dict[str, Any] = {"vectors": [task.model.w], "others": [task.model.b], "server_round": 1, "seed": 5}
    result = train_round(
        task,  # type: ignore[arg-type]
        toy_data() if data is None else data,
        config,
        **{"total_rounds": 3, **settings, **changes},
    )
    return task.model, result


def flat(model: Linear) -> Tensor:
    return torch.cat([model.w.detach().ravel(), model.b.detach()])


START = flat(Linear())


def gradient(model: Linear, data: EncodedData) -> Tensor:
    """Of the mean loss over all examples, at the model's present values."""
    task = FakeTask()
    task.model.load_state_dict(model.state_dict())
    batch = collate(task, data, range(len(data)), CPU)  # type: ignore[arg-type]
    task.task_loss(task.forward(batch), batch["labels"]).backward()
    assert task.model.w.grad is not None and task.model.b.grad is not None
    return torch.cat([task.model.w.grad.ravel(), task.model.b.grad])


class PlainSteps(torch.optim.SGD):
    """Gradient descent in AdamW's place: its steps show the gradient and the rate. Keeps every step's rates."""

    rates: list[list[float]]

    def __init__(self, groups: list[dict[str, Any]], weight_decay: float) -> None:
        super().__init__(groups, weight_decay=weight_decay)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.rates.append([group["lr"] for group in self.param_groups])
        super().step(closure)


@pytest.fixture
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> type[PlainSteps]:
    monkeypatch.setattr(PlainSteps, "rates", [], raising=False)
    monkeypatch.setattr(torch.optim, "AdamW", PlainSteps)
    return PlainSteps


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(1, 4), (7, 2), (8, 4), (230, 3)])
def test_batches_are_a_permutation(count: int, size: int) -> None:
    made = batches(toy_data(count), size, (1, 2, 3))
    assert sorted(index for batch in made for index in batch) == list(range(count))
    assert len(made) == math.ceil(count / size)
    assert sorted(map(len, made))[1:] == [size] * (len(made) - 1)


def test_batches_depend_on_the_seed_alone() -> None:
    data = toy_data(40)
    seeds = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (2**63 - 1, 1, 0)]
    made = [batches(data, 4, seed) for seed in seeds]
    assert made == [batches(data, 4, seed) for seed in seeds]
    assert len({str(found) for found in made}) == len(seeds)


def test_batches_hold_examples_of_like_length_in_no_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=400)
    data = EncodedData([{}] * len(lengths), np.zeros((400, OUTPUTS)), [int(n) for n in lengths])
    made = batches(data, 8, (0, 1, 0))
    spread = [float(np.ptp(lengths[batch])) for batch in made]
    assert np.mean(spread) < 10
    longest = [int(lengths[batch].max()) for batch in made]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


# -- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("linear", 0.0, 0.0),
        ("linear", 0.1, 0.5),
        ("linear", 0.2, 1.0),
        ("linear", 0.6, 0.5),
        ("linear", 1.0, 0.0),
        ("linear", 1.5, 0.0),
        ("cosine", 0.1, 0.5),
        ("cosine", 0.2, 1.0),
        ("cosine", 0.4, 0.5 * (1 + math.sqrt(0.5))),
        ("cosine", 0.6, 0.5),
        ("cosine", 1.0, 0.0),
        ("constant", 0.1, 0.5),
        ("constant", 0.2, 1.0),
        ("constant", 1.0, 1.0),
    ],
)
def test_rate_factor(schedule: str, progress: float, factor: float) -> None:
    config = TrainConfig(warmup_fraction=0.2, schedule=schedule)
    assert rate_factor(progress, config) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(("warmup", "progress", "factor"), [(0.0, 0.0, 1.0), (1.0, 0.75, 0.75), (1.0, 1.0, 1.0)])
def test_rate_factor_without_or_with_nothing_but_warmup(warmup: float, progress: float, factor: float) -> None:
    assert rate_factor(progress, TrainConfig(warmup_fraction=warmup)) == pytest.approx(factor)


def test_rate_runs_over_all_rounds_for_each_group(plain_steps: type[PlainSteps]) -> None:
    config = plain(schedule="linear", learning_rate=0.8, head_learning_rate=0.08, batch_size=4)
    for number in (1, 2):
        train(config, server_round=number, total_rounds=2)
    expected = [1 - 0.125, 1 - 0.375, 1 - 0.625, 1 - 0.875]
    np.testing.assert_allclose(plain_steps.rates, [[0.8 * f, 0.08 * f] for f in expected])


# -- steps ------------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_of_what_is_trained() -> None:
    data = toy_data()
    before = predict(FakeTask(), data, plain())[1]  # type: ignore[arg-type]
    task = FakeTask()
    model, result = train(plain(local_epochs=20, learning_rate=0.05, head_learning_rate=0.05), data, task)
    after = predict(task, data, plain())[1]  # type: ignore[arg-type]
    assert after < 0.5 * before
    assert after < result.mean_loss < before
    assert model.frozen.item() == 1.0 and model.frozen.grad is None


def test_round_is_repeatable_and_rounds_differ() -> None:
    config = plain(local_epochs=2)
    assert torch.equal(flat(train(config)[0]), flat(train(config)[0]))
    assert not torch.equal(flat(train(config)[0]), flat(train(config, server_round=2)[0]))
    assert not torch.equal(flat(train(config)[0]), flat(train(config, seed=6)[0]))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 4),
        ({"local_epochs": 3}, 12),
        ({"batch_size": 100}, 1),
        ({"accumulation_steps": 3}, 2),
        ({"accumulation_steps": 100, "local_epochs": 2}, 2),
        ({"max_local_steps": 3}, 3),
        ({"max_local_steps": 6, "local_epochs": 2}, 6),
        ({"max_local_steps": 100}, 4),
    ],
)
def test_number_of_steps(plain_steps: type[PlainSteps], settings: dict[str, int], steps: int) -> None:
    _, result = train(plain(**settings))
    assert result.num_steps == len(plain_steps.rates) == steps


@pytest.mark.parametrize(("size", "accumulation"), [(7, 1), (2, 4), (3, 3), (1, 7)])
def test_accumulated_batches_are_one_big_batch(plain_steps: type[PlainSteps], size: int, accumulation: int) -> None:
    data = toy_data(7)
    config = plain(batch_size=size, accumulation_steps=accumulation, learning_rate=0.25, head_learning_rate=0.25)
    model, result = train(config, data)
    assert result.num_steps == 1
    torch.testing.assert_close(flat(model), START - 0.25 * gradient(Linear(), data))
    assert result.mean_loss == pytest.approx(predict(FakeTask(), data, config)[1], rel=1e-6)  # type: ignore[arg-type]


def test_clipping_limits_the_step(plain_steps: type[PlainSteps]) -> None:
    data = toy_data()
    whole = {"batch_size": 7, "learning_rate": 1.0, "head_learning_rate": 1.0}
    full = gradient(Linear(), data)
    assert full.norm() > 0.5
    clipped = START - flat(train(plain(clip_norm=0.5, **whole), data)[0])
    torch.testing.assert_close(clipped, 0.5 * full / full.norm(), rtol=1e-4, atol=1e-6)
    for norm in (0.0, 1e3):
        torch.testing.assert_close(START - flat(train(plain(clip_norm=norm, **whole), data)[0]), full)


def test_proximal_term_by_hand(plain_steps: type[PlainSteps]) -> None:
    data, rate, mu = toy_data(), 0.1, 0.7
    config = plain(batch_size=7, local_epochs=2, learning_rate=rate, head_learning_rate=rate)
    first, _ = train(plain(batch_size=7, learning_rate=rate, head_learning_rate=rate), data, proximal_mu=mu)
    torch.testing.assert_close(flat(first), START - rate * gradient(Linear(), data))
    second, _ = train(config, data, proximal_mu=mu)
    pull = mu * (flat(first) - START)
    torch.testing.assert_close(flat(second), flat(first) - rate * (gradient(first, data) + pull))


def test_proximal_term_keeps_near_the_start() -> None:
    config = plain(local_epochs=30, learning_rate=0.05, head_learning_rate=0.05)
    distances = [float((flat(train(config, proximal_mu=mu)[0]) - START).norm()) for mu in (0.0, 1.0, 100.0)]
    assert distances[0] > distances[1] > 2 * distances[2]


def test_only_what_is_asked_for_is_trained() -> None:
    task = FakeTask()
    task.model.b.requires_grad_(False)
    model, _ = train(plain(weight_decay=0.5), task=task, vectors=[task.model.w], others=[])
    assert torch.equal(model.b.detach(), START[-OUTPUTS:])
    assert not torch.equal(model.w.detach().ravel(), START[:-OUTPUTS])


def test_rates_of_vectors_and_head_are_their_own() -> None:
    model, _ = train(plain(learning_rate=0.01, head_learning_rate=0.0001, batch_size=7))
    # AdamW's first step is the rate, whatever the gradient
    torch.testing.assert_close((flat(model) - START).abs(), torch.tensor([0.01] * 6 + [0.0001] * 2), rtol=1e-3, atol=0)


def test_model_trains_and_evaluates_in_its_mode() -> None:
    task = FakeTask()
    task.model.eval()
    train(plain(batch_size=7), task=task)
    predict(task, toy_data(), plain(batch_size=7))  # type: ignore[arg-type]
    assert task.model.modes == [True, False]


def test_bfloat16_trains_float32_parameters() -> None:
    model, _ = train(plain(precision="bfloat16", batch_size=7))
    exact, _ = train(plain(precision="float32", batch_size=7))
    assert model.w.dtype == torch.float32
    torch.testing.assert_close(flat(model), flat(exact), rtol=0, atol=5e-3)


class Steep(FakeTask):
    """Gradients that overflow float16 at the scale that a scaler begins with."""

    def task_loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return 100 * super().task_loss(logits, labels, reduction)


def test_float16_takes_every_step_however_far_its_scale_has_to_fall() -> None:
    task = Steep()
    train(plain(precision="float16", batch_size=7, learning_rate=0.01, head_learning_rate=0.01), task=task)
    torch.testing.assert_close((flat(task.model) - START).abs(), torch.full((8,), 0.01), rtol=1e-2, atol=0)


def test_float16_tells_of_a_gradient_that_no_scale_makes_finite() -> None:
    class Endless(FakeTask):
        def task_loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
            loss = super().task_loss(logits, labels, reduction)
            loss.register_hook(lambda grad: grad * math.inf)
            return loss

    task = Endless()
    with pytest.raises(NumericsError, match=r"step 1; got loss \d"):
        train(plain(precision="float16", batch_size=7), task=task)
    assert torch.equal(flat(task.model), START)


def test_float16_trains_float32_parameters() -> None:
    data = toy_data()
    before = predict(FakeTask(), data, plain())[1]  # type: ignore[arg-type]
    task = FakeTask()
    model, result = train(plain(precision="float16", local_epochs=20, learning_rate=0.05), data, task)
    assert model.w.dtype == torch.float32 and bool(flat(model).isfinite().all())
    assert result.num_steps == 80
    assert predict(task, data, plain())[1] < 0.8 * before  # type: ignore[arg-type]


# -- numbers that are not finite --------------------------------------------------------------------------------------


def test_loss_that_is_not_finite_stops_before_the_step() -> None:
    data = toy_data()
    data.labels[3, 1] = np.nan
    task = FakeTask()
    with pytest.raises(NumericsError, match="left the finite numbers in local step 1; got loss nan") as caught:
        train(plain(batch_size=7), data, task)
    assert torch.equal(flat(task.model), START)
    assert public_reason(caught.value) == "numerics: loss not finite in local step 1"


def test_gradient_that_is_not_finite_stops_before_the_step() -> None:
    class Kink(FakeTask):
        def task_loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
            return (logits * 0).abs().sqrt().sum()  # the root has no slope at 0

    task = Kink()
    with pytest.raises(NumericsError, match=r"got loss 0\.0, gradient norm nan"):
        train(plain(), task=task)
    assert torch.equal(flat(task.model), START)


# -- prediction and devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 50])
def test_predictions_come_in_the_order_of_the_data(size: int) -> None:
    data, task = toy_data(9), FakeTask()
    outputs, loss = predict(task, data, plain(batch_size=size))  # type: ignore[arg-type]
    batch = collate(task, data, range(9), CPU)  # type: ignore[arg-type]
    expected = task.forward(batch).detach()
    assert (outputs.shape, outputs.dtype) == ((9, OUTPUTS), np.dtype(np.float32))
    np.testing.assert_allclose(outputs, expected.numpy(), rtol=1e-6, atol=1e-6)
    assert loss == pytest.approx(float(task.task_loss(expected, batch["labels"])), rel=1e-6)


def test_collate_takes_rows_and_labels_together() -> None:
    data = toy_data(5)
    batch = collate(FakeTask(), data, [4, 1], CPU)  # type: ignore[arg-type]
    np.testing.assert_array_equal(batch["labels"].numpy(), data.labels[[4, 1]])
    assert batch["x"].sum(1).tolist() == [data.lengths[4], data.lengths[1]] == [1, 2]


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_device_is_the_fastest(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == expected
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(("precision", "dtype"), [("auto", None), ("float32", None), ("bfloat16", torch.bfloat16)])
def test_precision_of_the_forward_pass(precision: str, dtype: torch.dtype | None) -> None:
    context = autocast(TrainConfig(precision=precision), CPU)
    assert isinstance(context, nullcontext) == (dtype is None)
    with context:
        product = torch.ones(2, 3) @ torch.ones(3, 1)
    assert product.dtype == (dtype or torch.float32)


def test_threads_are_those_of_the_run_or_those_that_were_found() -> None:
    found = torch.get_num_threads()
    training.use_threads(0)
    assert torch.get_num_threads() == found
    training.use_threads(found + 1)
    assert torch.get_num_threads() == found + 1
    training.use_threads(0)
    assert torch.get_num_threads() == found
