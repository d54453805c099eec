"""Which aggregation error is reported, by method and strategy."""

from __future__ import annotations

import pytest

from giva_core.config import RunConfig
from giva_core.types import ModelSchema
from server.exactness import aggregated


@pytest.mark.parametrize("method", ["ffa-lora", "lora-xs"])
@pytest.mark.parametrize(("strategy", "error"), [("fedavg", 0.0), ("fedprox", 0.0), ("fedmedian", None)])
def test_a_linear_method_is_exact_where_the_strategy_takes_the_mean(method: str, strategy: str, error: object) -> None:
    config = RunConfig(method=method).replace(strategy__name=strategy)
    assert aggregated(config, ModelSchema((), (), {}), None, [], [], {}, {}) == (error, {})
