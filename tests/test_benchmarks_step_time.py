"""What the benchmark of a training step compares is compared on even terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

TOKENS, RANK = 2 * 16, 4


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import _shapes
    import step_time

    return _shapes, step_time


def kept_by(benchmark: Any, dtype: Any) -> tuple[dict[str, int], dict[str, set[Any]], int]:
    """Bytes that autograd keeps by method, types of what is trained, and the number of adapted layers."""
    from giva_core.config import GivaConfig
    from giva_core.inject import layer_shapes

    shapes, step_time = benchmark
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape = shapes.Shape("Qwen2Config", {"vocab_size": 50, **sizes}, shapes.GATED, tokens=16, is_causal=True)
    model = shapes.build(shape, torch.device("cpu"), dtype, 2)
    batch = shapes.make_batch(shape, 2, torch.device("cpu"), dtype)
    layers, ranks = layer_shapes(model, GivaConfig(rank=RANK, target_modules=shape.targets), [])
    bases = shapes.random_bases(layers, ranks)
    kept = {"frozen": step_time.kept_bytes(step_time.frozen_pass(model, layers, batch), model)}
    types = {}
    for name, (add, _) in shapes.METHODS.items():
        adapted = add(shapes.sharing_copy(model), layers, bases, RANK)
        kept[name] = step_time.kept_bytes(step_time.step(adapted, batch), adapted)
        types[name] = {p.dtype for p in adapted.parameters() if p.requires_grad}
    return kept, types, len(layers)


def test_the_floor_keeps_nothing_that_an_adapted_model_does_not(benchmark: Any) -> None:
    kept, _, layers = kept_by(benchmark, torch.float32)
    assert kept["giva"] - kept["frozen"] == 4 * TOKENS * RANK * layers


def test_rivals_are_of_the_weights_type(benchmark: Any) -> None:
    kept, types, _ = kept_by(benchmark, torch.bfloat16)
    assert all(found == {torch.bfloat16} for name, found in types.items() if name != "giva")
    single, _, _ = kept_by(benchmark, torch.float32)
    assert kept["lora"] - kept["frozen"] == (single["lora"] - single["frozen"]) // 2
