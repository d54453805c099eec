"""How the sites' arrays become the next global arrays: the project's own FedAvg, or any Flower strategy for arrays.

The round loop owns sampling, deadlines and checks; a strategy is asked for two things only, what it wants to send along
(FedProx's mu) and what it makes of the updates. Flower's strategies are driven through their public methods.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from giva_core.aggregate import weighted_mean
from giva_core.config import RunConfig
from giva_core.errors import ConfigError, NumericsError, UpdateError
from giva_core.types import Arrays, ClientUpdate

FLOWER_STRATEGIES: dict[str, type[flower.FedAvg]] = {
    "fedprox": flower.FedProx,
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedadagrad": flower.FedAdagrad,
    "fedmedian": flower.FedMedian,
    "trimmed-mean": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
}
# the round loop's own business
_RESERVED = {
    "fraction_train",
    "fraction_evaluate",
    "min_train_nodes",
    "min_evaluate_nodes",
    "min_available_nodes",
    "weighted_by_key",
    "arrayrecord_key",
    "configrecord_key",
    "train_metrics_aggr_fn",
    "evaluate_metrics_aggr_fn",
}


class Aggregator(Protocol):
    """What the round loop asks of a strategy.

    Attributes:
        is_mean: Whether `aggregate` is the mean weighted by examples, which can be summed as updates come.
    """

    is_mean: bool

    def prepare(self, server_round: int, arrays: Arrays) -> float:
        """Take note of the global arrays before a round; returns FedProx's mu for the sites, 0 for none."""

    def aggregate(self, server_round: int, updates: Sequence[ClientUpdate]) -> Arrays:
        """The next global arrays, float32, from updates in a fixed order."""

    def state(self) -> Arrays:
        """What must be stored for the run to be resumed: momenta and the like."""

    def load_state(self, state: Arrays) -> None:
        """The inverse of `state`."""


class FedAvg:
    """Federated averaging (McMahan et al., arXiv:1602.05629), weighted by examples, the same in whatever order."""

    is_mean = True

    def prepare(self, server_round: int, arrays: Arrays) -> float:
        """Nothing to send along."""
        return 0.0

    def aggregate(self, server_round: int, updates: Sequence[ClientUpdate]) -> Arrays:
        """`Σ n_k x_k / Σ n_k`."""
        return weighted_mean([update.arrays for update in updates], [update.num_examples for update in updates])

    def state(self) -> Arrays:
        """None."""
        return {}

    def load_state(self, state: Arrays) -> None:
        """None."""


class FlowerAggregator:
    """One of Flower's strategies, driven through `configure_train` and `aggregate_train`.

    Args:
        strategy: The strategy; it samples nothing and waits for nobody, since the round loop has done both.
    """

    is_mean = False

    def __init__(self, strategy: flower.Strategy) -> None:
        self.strategy = strategy
        self._fresh = copy.deepcopy(strategy)

    def prepare(self, server_round: int, arrays: Arrays) -> float:
        """Let the strategy see the global arrays; returns the proximal mu that it puts into its messages.

        Momenta belong to the arrays they were made of. Where these change, which is between head rounds and training
        rounds, the strategy starts afresh.
        """
        kept = [value for value in vars(self.strategy).values() if isinstance(value, ArrayRecord) or _is_arrays(value)]
        if any(set(value) != set(arrays) for value in kept):
            self.strategy = copy.deepcopy(self._fresh)
        # FedAvgM remembers the arrays it made; the round loop may have kept some of them as they were
        if hasattr(self.strategy, "current_arrays"):
            self.strategy.current_arrays = None
        messages = list(self.strategy.configure_train(server_round, _record(arrays), ConfigRecord(), _OneNode()))
        config = next(iter(messages[0].content.config_records.values())) if messages else {}
        return float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]

    def aggregate(self, server_round: int, updates: Sequence[ClientUpdate]) -> Arrays:
        """What the strategy makes of the updates, cast back to float32 (FedAdam and its kin return float64)."""
        replies = [_as_reply(update, node_id) for node_id, update in enumerate(updates, start=1)]
        try:
            record, _ = self.strategy.aggregate_train(server_round, replies)
        except ValueError as error:  # e.g. Bulyan with too few sites
            raise UpdateError(
                f"the strategy {type(self.strategy).__name__} cannot aggregate {len(updates)} updates",
                got=error,
                cause="too few sites for its options",
                remedy="lower its options or raise rounds.min-sites",
            ) from error
        if record is None:
            raise UpdateError(
                f"the strategy {type(self.strategy).__name__} returned no arrays", got=f"{len(updates)} updates"
            )
        made = {name: array.numpy().astype(np.float32) for name, array in record.items()}
        return {name: made[name] for name in updates[0].arrays}

    def state(self) -> Arrays:
        """The arrays that the strategy keeps between rounds, flattened to `attribute/kind/key`."""
        found: Arrays = {}
        for attribute, value in vars(self.strategy).items():
            if isinstance(value, ArrayRecord):
                found.update({f"{attribute}/record/{name}": array.numpy() for name, array in value.items()})
            elif _is_arrays(value):
                found.update({f"{attribute}/dict/{name}": array for name, array in value.items()})
            elif isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
                found.update({f"{attribute}/list/{index:06d}": array for index, array in enumerate(value)})
        return found

    def load_state(self, state: Arrays) -> None:
        """Put the stored arrays back into the strategy's attributes."""
        grouped: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for name, array in state.items():
            attribute, kind, key = name.split("/", 2)
            grouped.setdefault((attribute, kind), {})[key] = array
        make: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
            "record": _record,
            "dict": dict,
            "list": lambda items: [items[key] for key in sorted(items)],
        }
        for (attribute, kind), items in grouped.items():
            setattr(self.strategy, attribute, make[kind](items))


def make_aggregator(config: RunConfig) -> Aggregator:
    """The strategy that `config` names.

    Raises:
        ConfigError: There is no such strategy, or it has no such option.
    """
    name, options = config.strategy.name, config.strategy.parsed_options()
    if name == "fedavg":
        if options:
            raise ConfigError("fedavg takes no options", got=sorted(options))
        return FedAvg()
    if name not in FLOWER_STRATEGIES:
        raise ConfigError(
            "strategy.name is not a known strategy", got=repr(name), expected=", ".join(["fedavg", *FLOWER_STRATEGIES])
        )
    kind = FLOWER_STRATEGIES[name]
    known = set(inspect.signature(kind).parameters) - _RESERVED
    unknown = {key.replace("-", "_") for key in options} - known
    if unknown:
        raise ConfigError(f"{name} has no option {sorted(unknown)}", expected=sorted(known))
    chosen = {key.replace("-", "_"): value for key, value in options.items()}
    try:
        strategy = kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, **chosen)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} refuses its options", got=error) from None
    return FlowerAggregator(strategy)


def _is_arrays(value: Any) -> TypeGuard[Arrays]:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, np.ndarray) for item in value.values())


def _record(arrays: Arrays) -> ArrayRecord:
    # sorted, since some strategies pair arrays by position, and a stored state may come back in another order
    return ArrayRecord({name: Array(array) for name, array in sorted(arrays.items())})


def _as_reply(update: ClientUpdate, node_id: int) -> Message:
    metrics = MetricRecord({"num-examples": update.num_examples, "train_loss": update.train_loss})
    return Message(RecordDict({"arrays": _record(update.arrays), "metrics": metrics}), node_id, "train")


class _OneNode(Grid):
    """A grid with one node: enough for a strategy to write down the message it would send."""

    def get_node_ids(self) -> Iterable[int]:
        return [1]

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise UpdateError("a strategy tried to send messages by itself", expected="a strategy that only aggregates")

    run = property(_unused)
    set_run = create_message = push_messages = pull_messages = send_and_receive = _unused


def check_finite(arrays: Arrays) -> None:
    """Raise NumericsError where an aggregated array is not finite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NumericsError(
                f"the aggregate of '{name}' is not finite",
                cause="the server's learning rate is too large",
                remedy="lower the strategy's rate and resume the run",
            )
