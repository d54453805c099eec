"""Whole federations in this process: real model code, real messages, tiny weights."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from stored_runs import run_killed_before, same_bytes, state_of

from client.alone import site_at, train_alone
from giva_core.checkpoint import load_adapter
from server.simulate import resume, simulate


def test_a_run_goes_through_all_phases_and_leaves_an_adapter(toy_config, store):
    run_id = simulate(toy_config, store)
    summary = store.run(run_id)
    assert summary.status == "completed"
    phases = [(record.phase, record.round) for record in store.rounds(run_id)]
    assert phases == [
        ("hello", 1), ("head", 1), ("calibrate", 1), ("calibrate", 2), ("calibrate", 3), ("bases", 1), ("train", 1),
        ("train", 2), ("train", 3),
    ]  # fmt: skip
    last = store.rounds(run_id, "train")[-1]
    assert [site.site for site in last.sites] == ["site-1", "site-2", "site-3"]
    assert all(site.status == "ok" and site.bytes_up > 0 and site.bytes_down > 0 for site in last.sites)
    assert last.total_examples == sum(site.num_examples for site in last.sites) == 24 + 32 + 40
    assert last.train_loss < store.rounds(run_id, "head")[0].train_loss
    assert {"accuracy", "worst_accuracy", "macro_f1", "mcc"} <= last.metrics.keys()
    assert 0 <= last.aggregation_error < 1
    adapter = load_adapter(store.adapter_folder(run_id))
    assert adapter.bases.digest == summary.facts["bases_digest"]
    assert same_bytes(adapter.arrays, store.last_state(run_id).arrays)


def test_bytes_of_a_round_are_the_numbers_and_little_more(toy_config, store):
    run_id = simulate(toy_config, store)
    numbers = sum(array.size for array in store.last_state(run_id).arrays.values())
    *inner, last = store.rounds(run_id, "train")
    for site in inner[0].sites:  # its state travels once: the sites evaluate it when they get it to train from
        assert site.eval_loss is not None
        assert 4 * numbers <= site.bytes_up <= 4 * numbers + 2500
        assert 4 * numbers <= site.bytes_down <= 4 * numbers + 2500
    for site in last.sites:  # no later round brings its evaluation
        assert 8 * numbers <= site.bytes_down <= 8 * numbers + 2500


def test_same_seed_same_bytes_and_another_seed_other_bytes(toy_config, store):
    first, second = simulate(toy_config, store), simulate(toy_config, store)
    other = simulate(toy_config.replace(giva__seed=1), store)
    assert store.run(first).facts == store.run(second).facts
    assert same_bytes(state_of(store, first), state_of(store, second))
    assert store.run(first).facts["bases_digest"] != store.run(other).facts["bases_digest"]
    assert not same_bytes(state_of(store, first), state_of(store, other))


@pytest.mark.parametrize("settings", [{}, {"giva__init": "topsv", "giva__power_passes": 0}])
def test_one_site_equals_training_alone_bit_for_bit(toy_config, toy_folder, tmp_path, store, settings):
    config = toy_config.replace(rounds__min_sites=1, rounds__quorum=1, **settings)
    alone = tmp_path / "one"
    alone.mkdir()
    (alone / "site-2").symlink_to(toy_folder / "site-2")
    run_id = simulate(config.replace(data__folder=str(alone)), store)
    result = train_alone(config, site_at(toy_folder / "site-2", config), tmp_path / "adapter")
    assert result.bases_digest == store.run(run_id).facts["bases_digest"]
    assert result.arrays_digest == store.run(run_id).facts["arrays_digest"]
    assert same_bytes(result.arrays, store.last_state(run_id).arrays)
    alone_adapter, adapter = load_adapter(tmp_path / "adapter"), load_adapter(store.adapter_folder(run_id))
    assert same_bytes(alone_adapter.arrays, adapter.arrays)
    assert alone_adapter.metadata.head_modules == adapter.metadata.head_modules == ("classifier",)


@pytest.mark.parametrize("init", ["topsv", "secsv", "rowalign"])
def test_inits_that_need_another_pass(toy_config, store, init):
    run_id = simulate(toy_config.replace(giva__init=init, giva__rank=3, rounds__num_rounds=1), store)
    assert len(store.rounds(run_id, "calibrate")) == 4
    assert load_adapter(store.adapter_folder(run_id)).bases.init == init


@pytest.mark.parametrize("mode", ["fedavg", "alternate", "exact"])
def test_modes(toy_config, store, mode):
    config = toy_config.replace(rounds__mode=mode, train__local_epochs=2, rounds__evaluate_every=9)
    run_id = simulate(config, store)
    records = store.rounds(run_id, "train")
    errors = [record.aggregation_error for record in records]
    if mode == "fedavg":
        assert max(errors) > 1e-3
    else:
        assert max(errors) < 1e-5
    stored = store.last_state(run_id)
    assert any(name.endswith(".residual") for name in stored.extra) == (mode == "exact")
    assert any(np.abs(array).max() > 0 for name, array in stored.extra.items()) == (mode == "exact")
    assert records[-1].train_loss < records[0].train_loss
    if mode == "alternate":
        sizes = [
            record.sites[0].bytes_up for record in records
        ]  # lambda_o, lambda_s, lambda_o: the shorter one is less
        assert sizes[1] < sizes[0] and sizes[1] < sizes[2]


def test_alternate_stays_exact_where_momentum_moves_all_arrays(toy_config, store):
    momentum = {"strategy__name": "fedavgm", "strategy__options": '{"server_momentum": 0.9}'}
    run_id = simulate(toy_config.replace(rounds__mode="alternate", rounds__num_rounds=4, **momentum), store)
    plain = simulate(toy_config.replace(rounds__mode="alternate", rounds__num_rounds=4), store)
    assert not same_bytes(store.last_state(run_id).arrays, store.last_state(plain).arrays)
    states = [
        store._load(run_id, [f"train-{number:04d}"])[f"train-{number:04d}"] for number in range(1, 5)
    ]  # lambda_o, lambda_s, lambda_o, lambda_s
    for number, (before, after) in enumerate(itertools.pairwise(states), start=2):
        resting = ".lambda_o" if number % 2 == 0 else ".lambda_s"
        names = [name for name in after if ".lambda_" in name]
        assert all(np.array_equal(before[name], after[name]) == name.endswith(resting) for name in names)


@pytest.mark.parametrize(("name", "mode"), [("fedavg", "fedavg"), ("fedavg", "exact"), ("fedadam", "fedavg")])
def test_a_killed_run_resumes_to_the_same_bytes(toy_config, store, name, mode):
    config = toy_config.replace(strategy__name=name, rounds__mode=mode)
    whole = simulate(config, store)
    broken = run_killed_before(config, store, "train", 2)
    assert store.run(broken).rounds_done == 1
    assert resume(broken, store) == broken
    assert store.run(broken).status == "completed"
    assert same_bytes(state_of(store, broken), state_of(store, whole))
    assert store.run(broken).facts == store.run(whole).facts


@pytest.mark.parametrize("method", ["head", "lora"])
def test_baselines_run_in_the_same_loop(toy_config, store, method):
    run_id = simulate(toy_config.replace(method=method, lora__rank=3, train__learning_rate=1e-2), store)
    records = store.rounds(run_id)
    assert not [record for record in records if record.phase in ("calibrate", "bases")]
    error = store.rounds(run_id, "train")[-1].aggregation_error
    assert (error is None) if method == "head" else (error is not None and 0 < error < 1)
    names = store.last_state(run_id).arrays
    assert any("lora_A" in name for name in names) == (method == "lora")
    assert not any("lambda" in name for name in names)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_other_tasks(toy_config, toy_folder, tmp_path, store, kind):
    folder = tmp_path / kind
    for site in sorted(toy_folder.iterdir()):
        (folder / site.name).mkdir(parents=True)
        for name in ("train.jsonl", "test.jsonl"):
            rows = [json.loads(line) for line in (site / name).read_text().splitlines()]
            for index, row in enumerate(rows):
                hit = row["label"] == "left"
                row["label"] = ["left"] * hit + ["odd"] * (index % 2) if kind == "multilabel" else float(hit) + 0.1
            (folder / site.name / name).write_text("\n".join(json.dumps(row) for row in rows))
    labels = '["left", "odd"]' if kind == "multilabel" else "[]"
    run_id = simulate(toy_config.replace(task__kind=kind, task__labels=labels, data__folder=str(folder)), store)
    metrics = store.rounds(run_id, "train")[-1].metrics
    assert ({"micro_f1", "subset_accuracy"} if kind == "multilabel" else {"pearson", "mse"}) <= metrics.keys()


def test_without_shared_counts_no_count_leaves_a_site(toy_config, store):
    run_id = simulate(toy_config.replace(task__share_counts=False, rounds__num_rounds=1), store)
    metrics = store.rounds(run_id, "train")[-1].metrics
    assert "accuracy" in metrics and "mean_site_macro_f1" in metrics and "macro_f1" not in metrics


def test_sampling_depends_on_the_seed_alone(toy_config, store):
    config = toy_config.replace(
        rounds__fraction_train=0.4, rounds__min_sites=2, rounds__fraction_evaluate=0.4, rounds__num_rounds=4
    )
    first, second = simulate(config, store), simulate(config, store)
    sampled = [[s.site for s in r.sites if s.num_steps] for r in store.rounds(first, "train")]
    assert sampled == [[s.site for s in r.sites if s.num_steps] for r in store.rounds(second, "train")]
    assert all(len(sites) == 2 for sites in sampled) and len({tuple(sites) for sites in sampled}) > 1


def test_an_evaluation_beside_the_training_is_the_one_asked_for_alone(toy_config, store):
    every = simulate(toy_config.replace(rounds__num_rounds=3), store)
    for number in (1, 2):
        even = toy_config.replace(train__schedule="constant", train__warmup_fraction=0.0)
        short = simulate(even.replace(rounds__num_rounds=number), store)
        long = simulate(even.replace(rounds__num_rounds=3), store)
        alone, beside = store.rounds(short, "train")[-1], store.rounds(long, "train")[number - 1]
        assert alone.eval_loss == beside.eval_loss is not None and alone.metrics == beside.metrics
    assert [record.eval_loss is not None for record in store.rounds(every, "train")] == [True] * 3
    assert all(record.eval_loss is not None for record in store.rounds(every, "head"))


def test_sites_outside_the_training_sample_evaluate_as_well(toy_config, store):
    config = toy_config.replace(rounds__fraction_train=0.4, rounds__min_sites=2, rounds__num_rounds=3)
    for record in store.rounds(simulate(config, store), "train"):
        assert sum(site.num_steps > 0 for site in record.sites) == 2
        assert sum(site.eval_examples for site in record.sites) == 11 + 12 + 13


def test_a_site_that_cannot_evaluate_trains_all_the_same(toy_config, store, monkeypatch):
    from client.trainer import LocalTrainer
    from giva_core.errors import DataError

    evaluate = LocalTrainer.evaluate

    def fail(self, arrays, digest):
        if self.site.name == "site-2":
            raise DataError("no", public="the evaluation rows are gone")
        return evaluate(self, arrays, digest)

    monkeypatch.setattr(LocalTrainer, "evaluate", fail)
    run_id = simulate(toy_config.replace(rounds__num_rounds=2), store)
    for record in store.rounds(run_id, "train"):
        broken = record.sites[1]
        assert record.eval_loss is not None and broken.eval_loss is None and broken.num_steps > 0
        assert "the evaluation rows are gone" in broken.reason
