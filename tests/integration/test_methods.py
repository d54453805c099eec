"""Every method in a whole federation: two sites, two rounds, a tiny encoder."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_runs import killed_run, same_bytes, state_of

from client.backbone import get_backbone
from giva_core import checkpoint
from giva_core.config import METHODS, RunConfig
from giva_core.errors import CheckpointError
from giva_core.export import _merge as merge
from giva_core.export import apply_adapter, merge_to_folder
from giva_core.inject import layer_shapes
from giva_core.lora_export import lora_matrices
from giva_core.model_card import SOURCES
from giva_core.models import load_task_model
from server.run_store import RunStore
from server.simulate import resume, simulate

# The toy encoder: hidden 16, intermediate 24, one layer, so four layers of 16 x 16, one of 24 x 16, one of 16 x 24.
SHAPES = [(16, 16)] * 4 + [(24, 16), (16, 24)]
HEAD = 2 * 16 + 2
ENVELOPE = 3000  # names, header and scalars of a message, its evaluation among them
SETTINGS: dict[str, dict[str, object]] = {
    "lora": {"lora.rank": 3},
    "ffa-lora": {"lora.rank": 3},
    "rolora": {"lora.rank": 3},
    "fedex-lora": {"lora.rank": 3},
    "vera": {"vera.rank": 12},
    "randlora": {"randlora.rank": 5, "randlora.alpha": 10.0},
}
CASES = [*METHODS, "giva/random", "lora-xs/gradient"]


def config_of(case: str, toy_config: RunConfig, two_sites: Path, **settings: object) -> RunConfig:
    method, _, bases = case.partition("/")
    flat = {
        **{"method": method, "rounds.num-rounds": 2, "rounds.min-sites": 2, "rounds.quorum": 2},
        **{"rounds.head-rounds": 1, "data.folder": str(two_sites), "train.learning-rate": 0.02},
        **({f"{method.replace('-', '_')}.bases": bases} if bases else {}),
        **SETTINGS.get(method, {}),
        **settings,
    }
    return RunConfig.from_flat({**toy_config.to_flat(), **flat})


@pytest.fixture
def two_sites(toy_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("site-1", "site-3"):
        (folder / name).symlink_to(toy_folder / name)
    return folder


def numbers_up(case: str, server_round: int) -> int:
    """Trained numbers beside the head that a site sends in a round, by hand."""
    method = case.partition("/")[0]
    rank = 4
    per_layer = {
        "giva": lambda o, i: o + rank,
        "osora": lambda o, i: o + rank,
        "lora": lambda o, i: 3 * (o + i),
        "fedex-lora": lambda o, i: 3 * (o + i),
        "ffa-lora": lambda o, i: 3 * o,
        "rolora": lambda o, i: 3 * (o if server_round == 1 else i),
        "vera": lambda o, i: o + 12,
        "randlora": lambda o, i: 5 * 4 + 4 * min(o, i),  # ceil(16 / 5) = 4 bases
        "lora-xs": lambda o, i: rank * rank,
        "head": lambda o, i: 0,
    }
    if method == "full":
        embeddings = (30 + 42 + 2) * 16 + 2 * 16
        return embeddings + sum(o * i + o for o, i in SHAPES) + 2 * 2 * 16
    return sum(per_layer[method](o, i) for o, i in SHAPES)


@pytest.mark.parametrize("case", CASES)
def test_a_method_trains_sends_what_it_says_and_resumes_to_the_same_bytes(
    case: str, toy_config: RunConfig, two_sites: Path, store: RunStore, tmp_path: Path
) -> None:
    config = config_of(case, toy_config, two_sites)
    run_id = simulate(config, store)
    first, second = store.rounds(run_id, "train")
    state = state_of(store, run_id)
    assert all(np.isfinite(array).all() for array in state.values())
    assert second.train_loss is not None and second.train_loss < store.rounds(run_id, "head")[0].train_loss
    calibrated = bool(store.rounds(run_id, "calibrate"))
    assert calibrated == (case in ("giva", "lora-xs/gradient"))
    for record in (first, second):
        numbers = numbers_up(case, record.round) + HEAD
        for site in record.sites:
            assert 4 * numbers <= site.bytes_up <= 4 * numbers + ENVELOPE
    # an adapter at its start does not travel, whatever the method; the scalars of a message take less than 1 KB
    assert all(0 < site.bytes_down - 4 * HEAD < 1000 for site in store.rounds(run_id, "head")[0].sites)
    head = store._load(run_id, ["head-0001"])["head-0001"]
    adapter = [name for name in state if not name.startswith("classifier.") and not name.startswith("strategy:")]
    assert any(np.abs(state[name] - head.get(name, 0.0)).max() > 1e-4 for name in adapter) == (case != "head")

    stopped = killed_run(config, store, lambda record: record.phase == "train")
    assert stopped != run_id
    resume(stopped, store)
    assert same_bytes(state_of(store, stopped), state)
    assert store.run(stopped).facts == store.run(run_id).facts
    assert_it_merges(config, store.adapter_folder(run_id), tmp_path / "merged")
    assert_it_is_a_lora_where_it_can_be(case, config, store.adapter_folder(run_id))


def assert_it_is_a_lora_where_it_can_be(case: str, config: RunConfig, adapter: Path) -> None:
    """`lora_B lora_A` is what the merged weight has beyond the plain one; the other methods say that they are none."""
    loaded = checkpoint.load_adapter(adapter)
    if case not in ("giva", "giva/random", "lora", "rolora", "lora-xs/gradient"):
        with pytest.raises(CheckpointError, match="no low-rank form"):
            lora_matrices(loaded)
        return
    plain, merged = load_task_model(config), load_task_model(config)
    apply_adapter(merged, loaded)
    merge(merged.model)
    for name, (A, B) in lora_matrices(loaded).items():
        found = merged.model.get_submodule(name).weight - plain.model.get_submodule(name).weight
        np.testing.assert_allclose(B @ A, found.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_benchmark_counts_what_a_site_trains(
    case: str, toy_config: RunConfig, two_sites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    wire = importlib.import_module("wire")
    config = config_of(case, toy_config, two_sites)
    task = load_task_model(config)
    layers, _ = layer_shapes(task.model, config.giva, exclude=task.head_modules)
    named = {name: tuple(parameter.shape) for name, parameter in task.model.named_parameters()}
    head = {name: shape for name, shape in named.items() if name.startswith("classifier.")}
    weights = {name: shape for name, shape in named.items() if name not in head}
    counted, found = wire.schema_of(config, wire.Shapes(layers, head, weights)), get_backbone(config, "cpu").schema
    assert dict(counted.state) == dict(found.state)
    assert counted.vector_shapes() == found.vector_shapes()
    assert set(counted.adapter) == set(found.adapter)


def assert_it_merges(config: RunConfig, adapter: Path, output: Path) -> None:
    """The stored adapter computes the same as the model that it is merged into, and not what the plain model does."""
    applied = load_task_model(config)
    batch = applied.collate(applied.encode(["a b c", "x y z p q", "k"]))
    with torch.no_grad():
        plain = applied.model(**batch).logits
        apply_adapter(applied, checkpoint.load_adapter(adapter))
        merge_to_folder(adapter, config.model.path, output)
        merged = load_task_model(config.replace(model__path=str(output)))
        expected, found = applied.model.eval()(**batch).logits, merged.model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_every_method_is_described() -> None:
    assert {*SOURCES, "giva", "head"} == set(METHODS)
