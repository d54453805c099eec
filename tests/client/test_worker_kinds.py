"""Every kind of task and every method at sites with workers of their own: the bytes of a run in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from live_worker import ROOMY, LiveWorker, federate
from task_kinds import KINDS, OPEN, SITES, assert_the_same, deployed, kind_config, write_kind

from giva_core.config import METHODS, RunConfig
from server.run_store import RunStore
from server.simulate import simulate


@pytest.mark.parametrize("case", list(KINDS))
def test_a_kind_of_task_gives_the_bytes_of_one_process(
    case: str, tmp_path: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_kind(tmp_path, case)
    # one site each: what a second one adds is the server's arithmetic, and its worker's start takes seconds
    (tmp_path / "sites" / SITES[1]).rename(tmp_path / SITES[1])
    config = kind_config(case, tmp_path, model, rounds__min_sites=1, rounds__quorum=1)
    alone = simulate(config, store)
    policy = {**OPEN, "tasks": [config.task.kind]}
    folder = tmp_path / "sites" / SITES[0]
    with LiveWorker(SITES[0], model, folder, data=KINDS[case].data, policy=policy) as worker:
        run_id = federate(deployed(config), store, 81, [worker], monkeypatch)
        status, said = worker.link.status(), worker.said()
    assert_the_same(store, alone, run_id)
    metrics = store.rounds(run_id, "train")[-1].metrics
    assert KINDS[case].metrics == {name for name in metrics if not name.startswith("worst_")}
    assert (status.model_loads, status.killed, status.refused) == (1, 0, 0)
    assert "Traceback" not in said and "failed" not in said and str(folder) not in said


METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"lora.rank": 3} for name in ("lora", "ffa-lora", "rolora", "fedex-lora")},
    "vera": {"vera.rank": 12},
    "randlora": {"randlora.rank": 5, "randlora.alpha": 10.0},
    "lora-xs/gradient": {"lora_xs.bases": "gradient"},
    "giva/random": {"giva.bases": "random"},
    "giva/int8": {"wire.precision": "int8"},
    "lora/int8": {"lora.rank": 3, "wire.precision": "int8"},
    "fedex-lora/float16": {"lora.rank": 3, "wire.precision": "float16"},
}
CASES = [name for name in METHODS if name not in ("giva", "head")] + [name for name in METHOD_SETTINGS if "/" in name]


@pytest.fixture(scope="module")
def workers(toy_model: Path, toy_folder: Path) -> Iterator[list[LiveWorker]]:
    """A worker for each of two toy sites, which take part in every method."""
    with ExitStack() as stack:
        yield [stack.enter_context(LiveWorker(site, toy_model, toy_folder / site, policy=OPEN)) for site in SITES]


@pytest.fixture
def two_sites(toy_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "two"
    folder.mkdir()
    for site in SITES:
        (folder / site).symlink_to(toy_folder / site)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_method_gives_the_bytes_of_one_process_and_leaves_nothing_behind(
    case: str,
    workers: list[LiveWorker],
    toy_config: RunConfig,
    two_sites: Path,
    store: RunStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = {"method": case.partition("/")[0], "rounds.num-rounds": 2, "rounds.min-sites": 2}
    settings = {**run, "data.folder": str(two_sites), **METHOD_SETTINGS.get(case, {})}
    config = RunConfig.from_flat({**toy_config.replace(**ROOMY).to_flat(), **settings})
    alone = simulate(config, store)
    loads = [worker.link.status().model_loads for worker in workers]
    for run_id in (1000 + CASES.index(case), 2000 + CASES.index(case)):  # the second finds what the first has left
        assert_the_same(store, alone, federate(deployed(config), store, run_id, workers, monkeypatch))
    assert [worker.link.status().model_loads for worker in workers] == [before + 1 for before in loads]
