"""What goes wrong in a federation: bad rows, bad updates, other digests, settings that fit nobody."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from giva_core.errors import BasesError, ConfigError, GivaError, QuorumError
from server.simulate import resume, simulate


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
    run_id = simulate(config, store)
    [record] = [site for site in store.rounds(run_id, "hello")[0].sites if site.status != "ok"]
    assert record.status == "failed" and reason in record.reason
    assert "secret" not in record.reason and str(tmp_path) not in record.reason
    assert [site.site for site in store.rounds(run_id, "train")[0].sites] == ["site-1", "site-3"]


def test_too_few_sites_fail_the_run_and_say_why(toy_config, toy_folder, tmp_path, store):
    config = toy_config.replace(data__folder=str(spoil(toy_folder, tmp_path, "site-2", [])))
    with pytest.raises(QuorumError, match="too few sites were admitted"):
        simulate(config, store)
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
    run_id = simulate(toy_config.replace(rounds__quorum=2, rounds__num_rounds=1), store)
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
    run_id = simulate(toy_config.replace(rounds__min_sites=2, rounds__num_rounds=2), store)
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
        simulate(toy_config.replace(**settings), store)
    assert store.runs()[0].status == "failed"


def test_rank_above_what_the_gradient_has_is_refused_by_layer(toy_config, store):
    with pytest.raises(GivaError, match=r"attention.* too low a rank; got 15 directions .* expected at least 16"):
        simulate(toy_config.replace(giva__rank=16, giva__calibration_batches=4), store)


def test_a_rank_that_no_layer_holds_is_refused_before_anything_is_done(toy_config, store):
    with pytest.raises(GivaError, match=r"target: giva\.rank 500 is above that of every layer, 16"):
        simulate(toy_config.replace(giva__rank=500), store)


def test_a_simulation_does_not_wait_for_sites_that_there_are_not(toy_config, store):
    with pytest.raises(
        ConfigError, match=r"got 3 folders .* rounds.min-sites = 4 .* set rounds.min-sites to 3 or less"
    ):
        simulate(toy_config.replace(rounds__min_sites=4), store)
    assert store.runs() == []


def test_other_bases_than_those_of_the_start_are_refused_on_resume(toy_config, store):
    run_id = simulate(toy_config, store)
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
    run_id = simulate(toy_config.replace(rounds__min_sites=2, rounds__num_rounds=1), store)
    [record] = store.rounds(run_id, "hello")[1].sites
    assert (record.site, record.status) == ("site-1", "refused") and reason in record.reason
    assert [site.site for site in store.rounds(run_id, "train")[0].sites] == ["site-2", "site-3"]


def test_a_refused_strategy_leaves_no_run_behind(toy_config, store):
    with pytest.raises(ConfigError, match="not a known strategy"):
        simulate(toy_config.replace(strategy__name="no-such"), store)
    assert store.runs() == []


def test_a_site_s_versions_and_device_are_facts_of_the_run(toy_config, store):
    facts = store.run(simulate(toy_config.replace(rounds__num_rounds=1), store)).facts
    assert {facts[f"site.site-{number}.device"] for number in (1, 2, 3)} == {"cpu"}
    assert "torch" in facts["site.site-2.versions"]


def test_a_corrupt_state_is_refused_on_resume(toy_config, store, monkeypatch):
    run_id = simulate(toy_config, store)
    store.set_status(run_id, "failed", "for the test")
    [path] = store.run_folder(run_id).glob("train-0003*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(GivaError, match="train-0003"):
        resume(run_id, store)
