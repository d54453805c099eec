"""Strategies: every one runs on the vectors, and one that is resumed goes on as if it had never stopped."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import pytest
import safetensors.numpy

from giva_core.config import RunConfig
from giva_core.errors import ConfigError, NumericsError, UpdateError
from giva_core.types import Arrays, ClientUpdate
from server.local_grid import LocalGrid
from server.strategy import FLOWER_STRATEGIES, Aggregator, FedAvg, check_finite, make_aggregator

SHAPES = {"z.lambda_o": (5,), "z.lambda_s": (3,), "head.weight": (2, 4)}
HEAD = ("head.weight",)
#: Options under which a strategy's state matters.
STATEFUL = {
    "fedavgm": '{"server-momentum": 0.9, "server-learning-rate": 0.5}',
    "fedadam": '{"eta": 0.1, "tau": 0.01}',
    "fedyogi": '{"eta": 0.1, "tau": 0.01}',
    "fedadagrad": '{"eta": 0.1, "tau": 0.01}',
}


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes no message outside a process of its own; a local grid sets what it asks for."""
    LocalGrid(lambda message, context: message, {}, {})
    monkeypatch.setattr(gc, "collect", lambda: 0)  # Bulyan collects garbage for every update: seconds, beside torch


def make(name: str, options: str = "") -> Aggregator:
    return make_aggregator(RunConfig.from_flat({"strategy.name": name, "strategy.options": options}))


def start(names: Sequence[str] = tuple(SHAPES)) -> Arrays:
    return {name: np.full(SHAPES[name], 0.5, np.float32) for name in names}


def toy_updates(count: int = 5, seed: int = 0, names: Sequence[str] = tuple(SHAPES)) -> list[ClientUpdate]:
    rng = np.random.default_rng(seed)
    arrays = [{name: rng.normal(size=SHAPES[name]).astype(np.float32) for name in names} for _ in range(count)]
    return [
        ClientUpdate(a, num_examples=3 + k, num_steps=1, train_loss=0.5, bases_digest="") for k, a in enumerate(arrays)
    ]


def run_rounds(aggregator: Aggregator, arrays: Arrays, numbers: Sequence[int]) -> Arrays:
    for number in numbers:
        aggregator.prepare(number, arrays)
        arrays = aggregator.aggregate(number, toy_updates(seed=number))
    return arrays


def stored(arrays: Arrays) -> Arrays:
    """Through safetensors' bytes, which give the arrays back in an order of their own."""
    return safetensors.numpy.load(safetensors.numpy.save(arrays)) if arrays else {}


def assert_same_bytes(first: Arrays, second: Arrays) -> None:
    assert set(first) == set(second)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


@pytest.mark.parametrize("name", ["fedavg", *FLOWER_STRATEGIES])
def test_every_strategy_makes_the_next_arrays(name: str) -> None:
    aggregator = make(name)
    assert aggregator.prepare(1, start()) == 0.0
    made = aggregator.aggregate(1, toy_updates())
    assert list(made) == list(SHAPES)
    assert {name: (a.shape, a.dtype) for name, a in made.items()} == {
        name: (shape, np.dtype(np.float32)) for name, shape in SHAPES.items()
    }
    check_finite(made)
    assert all((made[name] != start()[name]).any() for name in made)


@pytest.mark.parametrize("name", ["fedavg", *FLOWER_STRATEGIES])
def test_updates_and_global_arrays_are_left_alone(name: str) -> None:
    aggregator, arrays, updates = make(name), start(), toy_updates()
    aggregator.prepare(1, arrays)
    aggregator.aggregate(1, updates)
    assert_same_bytes(arrays, start())
    for update, before in zip(updates, toy_updates(), strict=True):
        assert_same_bytes(update.arrays, before.arrays)


def test_fedavg_weights_by_examples() -> None:
    updates = [
        ClientUpdate({"a": np.array([1.0], np.float32)}, 3, 1, 0.0, ""),
        ClientUpdate({"a": np.array([5.0], np.float32)}, 1, 9, 0.0, ""),
    ]
    assert FedAvg().aggregate(1, updates)["a"].tolist() == [2.0]
    assert FedAvg().state() == {}


def test_fedprox_averages_as_fedavg_and_sends_mu() -> None:
    prox = make("fedprox", '{"proximal-mu": 0.25}')
    assert prox.prepare(1, start()) == 0.25
    made, mean = prox.aggregate(1, toy_updates()), make("fedavg").aggregate(1, toy_updates())
    assert list(made) == list(mean)
    for name in made:
        np.testing.assert_allclose(made[name], mean[name], rtol=1e-6, atol=1e-7)


def test_fedmedian_is_the_median() -> None:
    made = make("fedmedian").aggregate(1, toy_updates())
    for name in SHAPES:
        np.testing.assert_array_equal(made[name], np.median([u.arrays[name] for u in toy_updates()], axis=0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("krum", '{"num-malicious-nodes": 1}'),
        ("multikrum", '{"num-malicious-nodes": 1, "num-nodes-to-select": 3}'),
        ("bulyan", '{"num-malicious-nodes": 1}'),
        ("fedmedian", ""),
        ("trimmed-mean", '{"beta": 0.2}'),
    ],
)
def test_robust_strategies_resist_one_wild_update(name: str, options: str) -> None:
    updates = toy_updates(7)
    for array in updates[2].arrays.values():
        array += 1e6
    made = make(name, options).aggregate(1, updates)
    assert max(float(np.abs(array).max()) for array in made.values()) < 5
    assert float(np.abs(make("fedavg").aggregate(1, updates)["z.lambda_o"]).max()) > 1e4


def test_krum_picks_one_of_the_updates() -> None:
    updates = toy_updates(4)
    made = make("krum").aggregate(1, updates)
    assert any(all(np.array_equal(made[n], update.arrays[n]) for n in made) for update in updates)


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", *FLOWER_STRATEGIES])
def test_resumed_strategy_continues_bit_for_bit(name: str) -> None:
    options = STATEFUL.get(name, "")
    whole = run_rounds(make(name, options), start(), [1, 2, 3])
    first = make(name, options)
    arrays = run_rounds(first, start(), [1])
    second = make(name, options)
    second.load_state(stored(first.state()))
    assert_same_bytes(run_rounds(second, arrays, [2, 3]), whole)


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_what_makes_the_difference(name: str) -> None:
    first = make(name, STATEFUL[name])
    arrays = run_rounds(first, start(), [1])
    assert first.state()
    forgetful = run_rounds(make(name, STATEFUL[name]), arrays, [2, 3])
    whole = run_rounds(first, arrays, [2, 3])
    assert any(not np.array_equal(forgetful[n], whole[n]) for n in whole)


@pytest.mark.parametrize("name", STATEFUL)
def test_state_comes_back(name: str) -> None:
    first = make(name, STATEFUL[name])
    run_rounds(first, start(), [1, 2])
    second = make(name, STATEFUL[name])
    second.load_state(stored(first.state()))
    assert_same_bytes(second.state(), first.state())
    assert all(isinstance(array, np.ndarray) for array in first.state().values())


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", ["fedavg", *FLOWER_STRATEGIES])
def test_strategy_starts_afresh_where_training_follows_head_rounds(name: str, resumed: bool) -> None:
    aggregator = make(name, STATEFUL.get(name, ""))
    aggregator.prepare(1, start(HEAD))
    head = aggregator.aggregate(1, toy_updates(names=HEAD))
    assert list(head) == list(HEAD)
    if resumed:
        state = stored(aggregator.state())
        aggregator = make(name, STATEFUL.get(name, ""))
        aggregator.load_state(state)
    arrays = {**start(), **head}
    made = run_rounds(aggregator, arrays, [1, 2])
    assert_same_bytes(made, run_rounds(make(name, STATEFUL.get(name, "")), arrays, [1, 2]))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("fedsomething", "", "not a known strategy; got 'fedsomething'; expected fedavg, fedprox"),
        ("fedavg", '{"eta": 1}', "fedavg takes no options"),
        ("fedadam", '{"etaa": 1}', r"fedadam has no option \['etaa'\]; expected \['beta_1'"),
        ("fedadam", '{"fraction-train": 0.5}', "fedadam has no option"),
        ("fedprox", '{"min_available_nodes": 5}', "fedprox has no option"),
    ],
)
def test_unknown_names_and_options(name: str, options: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make(name, options)


def test_too_few_updates_for_the_strategy() -> None:
    with pytest.raises(UpdateError, match="Bulyan returned no arrays; got 5 updates"):
        make("bulyan", '{"num-malicious-nodes": 1}').aggregate(1, toy_updates(5))


def test_aggregate_has_to_be_finite() -> None:
    check_finite(start())
    with pytest.raises(NumericsError, match=r"aggregate of 'z\.lambda_o' is not finite"):
        check_finite({**start(), "z.lambda_o": np.array([1.0, np.inf], np.float32)})
