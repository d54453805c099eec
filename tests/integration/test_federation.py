"""Whole federations in this process: real model code, real messages, tiny weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from client.alone import site_at, train_alone
from giva_core.checkpoint import load_adapter
from giva_core.config import RunConfig
from giva_core.errors import BasesError, ConfigError, GivaError, QuorumError
from server.run_store import RunStore
from server.simulate import resume, simulate


def run(config: RunConfig, store: RunStore) -> str:
    return simulate(config, store)


def state_of(store: RunStore, run_id: str) -> dict[str, np.ndarray]:
    stored = store.last_state(run_id)
    return {**stored.arrays, **stored.extra}


def same_bytes(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_a_run_goes_through_all_phases_and_leaves_an_adapter(toy_config, store):
    run_id = run(toy_config, store)
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
    run_id = run(toy_config, store)
    numbers = sum(array.size for array in store.last_state(run_id).arrays.values())
    *inner, last = store.rounds(run_id, "train")
    for site in inner[0].sites:  # its state travels once: the sites evaluate it when they get it to train from
        assert site.eval_loss is not None
        assert 4 * numbers <= site.bytes_up <= 4 * numbers + 2500
        assert 4 * numbers <= site.bytes_down <= 4 * numbers + 2500
    for site in last.sites:  # no later round brings its evaluation
        assert 8 * numbers <= site.bytes_down <= 8 * numbers + 2500


def test_same_seed_same_bytes_and_another_seed_other_bytes(toy_config, store):
    first, second = run(toy_config, store), run(toy_config, store)
    other = run(toy_config.replace(giva__seed=1), store)
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
    run_id = run(config.replace(data__folder=str(alone)), store)
    result = train_alone(config, site_at(toy_folder / "site-2", config), tmp_path / "adapter")
    assert result.bases_digest == store.run(run_id).facts["bases_digest"]
    assert result.arrays_digest == store.run(run_id).facts["arrays_digest"]
    assert same_bytes(result.arrays, store.last_state(run_id).arrays)
    alone_adapter, adapter = load_adapter(tmp_path / "adapter"), load_adapter(store.adapter_folder(run_id))
    assert same_bytes(alone_adapter.arrays, adapter.arrays)
    assert alone_adapter.metadata.head_modules == adapter.metadata.head_modules == ("classifier",)


@pytest.mark.parametrize("init", ["topsv", "secsv", "rowalign"])
def test_inits_that_need_another_pass(toy_config, store, init):
    run_id = run(toy_config.replace(giva__init=init, giva__rank=3, rounds__num_rounds=1), store)
    assert len(store.rounds(run_id, "calibrate")) == 4
    assert load_adapter(store.adapter_folder(run_id)).bases.init == init


@pytest.mark.parametrize("mode", ["fedavg", "alternate", "exact"])
def test_modes(toy_config, store, mode):
    config = toy_config.replace(rounds__mode=mode, train__local_epochs=2, rounds__evaluate_every=9)
    run_id = run(config, store)
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
    run_id = run(toy_config.replace(rounds__mode="alternate", rounds__num_rounds=4, **momentum), store)
    plain = run(toy_config.replace(rounds__mode="alternate", rounds__num_rounds=4), store)
    assert not same_bytes(store.last_state(run_id).arrays, store.last_state(plain).arrays)
    states = [
        store._load(run_id, [f"train-{number:04d}"])[f"train-{number:04d}"] for number in range(1, 5)
    ]  # lambda_o, lambda_s, lambda_o, lambda_s
    for number, (before, after) in enumerate(itertools.pairwise(states), start=2):
        resting = ".lambda_o" if number % 2 == 0 else ".lambda_s"
        names = [name for name in after if ".lambda_" in name]
        assert all(np.array_equal(before[name], after[name]) == name.endswith(resting) for name in names)


@pytest.mark.parametrize(("name", "mode"), [("fedavg", "fedavg"), ("fedavg", "exact"), ("fedadam", "fedavg")])
def test_a_killed_run_resumes_to_the_same_bytes(toy_config, store, monkeypatch, name, mode):
    config = toy_config.replace(strategy__name=name, rounds__mode=mode)
    whole = run(config, store)

    class Killed(BaseException):
        pass

    record = RunStore.record

    def dying(self, run_id, what, *args, **kwargs):
        if what.phase == "train" and what.round == 2:
            raise Killed
        record(self, run_id, what, *args, **kwargs)

    monkeypatch.setattr(RunStore, "record", dying)
    with pytest.raises(Killed):
        run(config, store)
    monkeypatch.undo()
    broken = store.runs()[0].run_id
    assert store.run(broken).rounds_done == 1
    assert resume(broken, store) == broken
    assert store.run(broken).status == "completed"
    assert same_bytes(state_of(store, broken), state_of(store, whole))
    assert store.run(broken).facts == store.run(whole).facts


@pytest.mark.parametrize("method", ["head", "lora"])
def test_baselines_run_in_the_same_loop(toy_config, store, method):
    run_id = run(toy_config.replace(method=method, lora__rank=3, train__learning_rate=1e-2), store)
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
    run_id = run(toy_config.replace(task__kind=kind, task__labels=labels, data__folder=str(folder)), store)
    metrics = store.rounds(run_id, "train")[-1].metrics
    assert ({"micro_f1", "subset_accuracy"} if kind == "multilabel" else {"pearson", "mse"}) <= metrics.keys()


def test_without_shared_counts_no_count_leaves_a_site(toy_config, store):
    run_id = run(toy_config.replace(task__share_counts=False, rounds__num_rounds=1), store)
    metrics = store.rounds(run_id, "train")[-1].metrics
    assert "accuracy" in metrics and "mean_site_macro_f1" in metrics and "macro_f1" not in metrics


def test_sampling_depends_on_the_seed_alone(toy_config, store):
    config = toy_config.replace(
        rounds__fraction_train=0.4, rounds__min_sites=2, rounds__fraction_evaluate=0.4, rounds__num_rounds=4
    )
    first, second = run(config, store), run(config, store)
    sampled = [[s.site for s in r.sites if s.num_steps] for r in store.rounds(first, "train")]
    assert sampled == [[s.site for s in r.sites if s.num_steps] for r in store.rounds(second, "train")]
    assert all(len(sites) == 2 for sites in sampled) and len({tuple(sites) for sites in sampled}) > 1


def test_an_evaluation_beside_the_training_is_the_one_asked_for_alone(toy_config, store):
    every = run(toy_config.replace(rounds__num_rounds=3), store)
    for number in (1, 2):
        even = toy_config.replace(train__schedule="constant", train__warmup_fraction=0.0)
        short = run(even.replace(rounds__num_rounds=number), store)
        long = run(even.replace(rounds__num_rounds=3), store)
        alone, beside = store.rounds(short, "train")[-1], store.rounds(long, "train")[number - 1]
        assert alone.eval_loss == beside.eval_loss is not None and alone.metrics == beside.metrics
    assert [record.eval_loss is not None for record in store.rounds(every, "train")] == [True] * 3
    assert all(record.eval_loss is not None for record in store.rounds(every, "head"))


def test_sites_outside_the_training_sample_evaluate_as_well(toy_config, store):
    config = toy_config.replace(rounds__fraction_train=0.4, rounds__min_sites=2, rounds__num_rounds=3)
    for record in store.rounds(run(config, store), "train"):
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
    run_id = run(toy_config.replace(rounds__num_rounds=2), store)
    for record in store.rounds(run_id, "train"):
        broken = record.sites[1]
        assert record.eval_loss is not None and broken.eval_loss is None and broken.num_steps > 0
        assert "the evaluation rows are gone" in broken.reason


# -- what goes wrong --------------------------------------------------------------------------------------------------


def spoil(folder: Path, tmp_path: Path, site: str, rows: list[dict[str, object]] | None) -> Path:
    """A copy of the toy sites in which one has other training rows."""
    copy = tmp_path / "spoilt"
    for source in sorted(folder.iterdir()):
        (copy / source.name).mkdir(parents=True)
        for name in ("train.jsonl", "test.jsonl"):
            text = (source / name).read_text()
            if source.name == site and name == "train.jsonl" and rows is not None:
                text = "\n".join(json.dumps(row) for row in rows)
            (copy / source.name / name).write_text(text)
    return copy


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "data: "),
        ([{"text": "a b", "label": "purple-secret"}], "data: unusable rows (label unknown)"),
        ([{"words": "a secret", "label": "left"}], "lacks a column"),
    ],
)
def test_bad_data_at_one_site_is_told_without_content_and_the_others_go_on(
    toy_config, toy_folder, tmp_path, store, rows, reason
):
    config = toy_config.replace(
        data__folder=str(spoil(toy_folder, tmp_path, "site-2", rows)), rounds__min_sites=2, rounds__num_rounds=1
    )
    run_id = run(config, store)
    [record] = [site for site in store.rounds(run_id, "hello")[0].sites if site.status != "ok"]
    assert record.status == "failed" and reason in record.reason
    assert "secret" not in record.reason and str(tmp_path) not in record.reason
    assert [site.site for site in store.rounds(run_id, "train")[0].sites] == ["site-1", "site-3"]


def test_too_few_sites_fail_the_run_and_say_why(toy_config, toy_folder, tmp_path, store):
    config = toy_config.replace(data__folder=str(spoil(toy_folder, tmp_path, "site-2", [])))
    with pytest.raises(QuorumError, match="too few sites were admitted"):
        run(config, store)
    assert store.runs()[0].status == "failed"


class Tampered:
    """The real ClientApp with one site's replies changed on their way."""

    def __init__(self, app, node_id, change):
        self.app, self.node_id, self.change = app, node_id, change

    def __call__(self, message, context):
        reply = self.app(message, context)
        if context.node_id == self.node_id and message.metadata.message_type == "train.round":
            self.change(reply.content)
        return reply


def nan_update(content):
    from flwr.app import Array

    state = content["arrays"]["state"].numpy().copy()
    state[3] = np.nan
    content["arrays"]["state"] = Array(state)


def short_update(content):
    from flwr.app import Array

    content["arrays"]["state"] = Array(content["arrays"]["state"].numpy()[:-1].copy())


def wrong_digest(content):
    content["values"]["bases"] = "0" * 64


def inflated_weight(content):
    content["values"]["num-examples"] = 10**9


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nan_update, "is not finite"),
        (short_update, "do not fit the run's schema"),
        (wrong_digest, "trained on other bases"),
        (inflated_weight, "number of training examples cannot be"),
    ],
)
def test_a_bad_update_is_refused_and_the_round_counts_without_it(toy_config, store, monkeypatch, change, reason):
    from client.app import app

    monkeypatch.setattr("server.simulate.load_app", lambda: Tampered(app, 1002, change))
    run_id = run(toy_config.replace(rounds__quorum=2, rounds__num_rounds=1), store)
    [record] = [site for site in store.rounds(run_id, "train")[0].sites if site.status != "ok"]
    assert record.site == "site-2" and record.status == "refused" and reason in record.reason
    assert store.rounds(run_id, "train")[0].total_examples == 24 + 40
    assert all(np.isfinite(array).all() for array in store.last_state(run_id).arrays.values())


def test_a_site_with_another_digest_is_taken_out(toy_config, store, monkeypatch):
    from client.app import app

    def other_machine(message, context):
        reply = app(message, context)
        if context.node_id == 1003 and message.metadata.message_type == "train.bases":
            reply.content["values"]["bases"] = "f" * 64
        return reply

    monkeypatch.setattr("server.simulate.load_app", lambda: other_machine)
    run_id = run(toy_config.replace(rounds__min_sites=2, rounds__num_rounds=2), store)
    [record] = [site for site in store.rounds(run_id, "bases")[0].sites if site.status != "ok"]
    assert record.site == "site-3" and record.status == "refused" and "giva bases self-test" in record.reason
    assert all(len(r.sites) == 2 for r in store.rounds(run_id, "train"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"giva__target_modules": "nothing.*"}, "target"),
        ({"giva__target_modules": '["no_such_layer"]'}, "target"),
        ({"model__path": "/nowhere/at/all"}, "config"),
    ],
)
def test_a_configuration_that_fits_no_site_fails_with_the_sites_reasons(toy_config, store, settings, message):
    with pytest.raises(GivaError, match=message):
        run(toy_config.replace(**settings), store)
    assert store.runs()[0].status == "failed"


def test_rank_above_what_the_gradient_has_is_refused_by_layer(toy_config, store):
    with pytest.raises(GivaError, match=r"attention.* too low a rank; got 15 directions .* expected at least 16"):
        run(toy_config.replace(giva__rank=16, giva__calibration_batches=4), store)


def test_a_rank_that_no_layer_holds_is_refused_before_anything_is_done(toy_config, store):
    with pytest.raises(GivaError, match=r"target: giva\.rank 500 is above that of every layer, 16"):
        run(toy_config.replace(giva__rank=500), store)


def test_a_simulation_does_not_wait_for_sites_that_there_are_not(toy_config, store):
    with pytest.raises(
        ConfigError, match=r"got 3 folders .* rounds.min-sites = 4 .* set rounds.min-sites to 3 or less"
    ):
        run(toy_config.replace(rounds__min_sites=4), store)
    assert store.runs() == []


def test_other_bases_than_those_of_the_start_are_refused_on_resume(toy_config, store):
    run_id = run(toy_config, store)
    store.set_status(run_id, "failed", "for the test")
    store.set_facts(run_id, {"bases_digest": "0" * 64})
    with pytest.raises(BasesError, match=r"expected 000000000000.*finish the run with the version that began it"):
        resume(run_id, store)


@pytest.mark.parametrize(
    ("change", "reason"), [(short_update, "cannot be read"), (nan_update, "is not what it said when it joined")]
)
def test_a_wrong_starting_head_costs_that_site_alone(toy_config, store, monkeypatch, change, reason):
    from client.app import app

    def lying(message, context):
        reply = app(message, context)
        if context.node_id == 1001 and message.metadata.message_type == "query.state":
            change(reply.content)
        return reply

    monkeypatch.setattr("server.simulate.load_app", lambda: lying)
    run_id = run(toy_config.replace(rounds__min_sites=2, rounds__num_rounds=1), store)
    [record] = store.rounds(run_id, "hello")[1].sites
    assert (record.site, record.status) == ("site-1", "refused") and reason in record.reason
    assert [site.site for site in store.rounds(run_id, "train")[0].sites] == ["site-2", "site-3"]


def test_a_refused_strategy_leaves_no_run_behind(toy_config, store):
    with pytest.raises(ConfigError, match="not a known strategy"):
        run(toy_config.replace(strategy__name="no-such"), store)
    assert store.runs() == []


def test_a_site_s_versions_and_device_are_facts_of_the_run(toy_config, store):
    facts = store.run(run(toy_config.replace(rounds__num_rounds=1), store)).facts
    assert {facts[f"site.site-{number}.device"] for number in (1, 2, 3)} == {"cpu"}
    assert "torch" in facts["site.site-2.versions"]


def test_a_corrupt_state_is_refused_on_resume(toy_config, store, monkeypatch):
    run_id = run(toy_config, store)
    store.set_status(run_id, "failed", "for the test")
    [path] = store.run_folder(run_id).glob("train-0003*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(GivaError, match="train-0003"):
        resume(run_id, store)
