"""Sites whose answers are texts: they train, federate, evaluate, export, and keep to their limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from answering_models import DECODERS, write_decoder, write_rows

from client.alone import site_at, train_alone
from client.policy import Policy, PolicyError
from client.site import SiteSettings
from client.trainer import LocalTrainer
from giva_core.checkpoint import load_adapter
from giva_core.config import RunConfig
from giva_core.export import apply_adapter, merge_to_folder
from giva_core.lora_export import lora_to_folder
from giva_core.models import load_task_model
from server.run_store import RunStore
from server.simulate import simulate


def answering(model: Path, folder: Path, **settings: object) -> RunConfig:
    config = RunConfig.from_nested(
        {
            "model": {"path": str(model)},
            "task": {"kind": "causal-lm", "max-length": 24, "multiple-choice": "sum", "generate-examples": 4},
            "giva": {"rank": 4, "calibration-batch-size": 16},
            "train": {"learning-rate": 0.3, "batch-size": 8},
            "rounds": {"num-rounds": 2, "min-sites": 2, "join-seconds": 1.0},
            "data": {"folder": str(folder)},
        }
    )
    return config.replace(**{"task__max_new_tokens": 4, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    for number, count in enumerate((24, 32), start=1):
        write_rows(root / f"site-{number}" / "train.jsonl", count, number, options=True)
        write_rows(root / f"site-{number}" / "test.jsonl", 9 + number, 10 + number, options=True)
    return root


@pytest.mark.parametrize("kind", list(DECODERS))
def test_every_architecture_learns_on_one_machine(tmp_path: Path, folder: Path, kind: str) -> None:
    config = answering(write_decoder(tmp_path, kind), folder, train__gradient_checkpointing=kind == "phi3")
    layers = {"phi3": 8, "gpt2": 8}.get(kind, 14)  # fused projections have fewer
    result = train_alone(config, site_at(folder / "site-2", config))
    first, last = (done.evaluation for done in result.rounds)
    assert first and last and last.loss < first.loss and result.rounds[-1].train_loss < result.rounds[0].train_loss
    assert last.metrics.keys() == {"token_accuracy", "perplexity", "exact_match", "choice_accuracy"}
    assert sum(name.endswith("lambda_s") for name in result.arrays) == layers and len(result.arrays) == 2 * layers


def test_a_federation_has_exact_totals_where_sums_are_shared(tmp_path: Path, folder: Path, store: RunStore) -> None:
    config = answering(write_decoder(tmp_path / "model"), folder, task__share_counts=True)
    run_id = simulate(config, store)
    last = store.rounds(run_id, "train")[-1]
    assert store.run(run_id).status == "completed"
    assert {"token_accuracy", "perplexity", "exact_match", "choice_accuracy", "worst_token_accuracy"} == set(
        last.metrics
    )
    assert {name for name in last.metrics if name.startswith("mean_site")} == set()
    private = simulate(answering(tmp_path / "model", folder), store)
    assert "mean_site_perplexity" in store.rounds(private, "train")[-1].metrics
    assert store.last_state(private).arrays.keys() == store.last_state(run_id).arrays.keys()

    adapter = load_adapter(store.adapter_folder(run_id))
    task = load_task_model(config)
    batch = task.collate(task.encode_rows(rows_of(folder, config), 24))
    plain = task.forward(batch)
    apply_adapter(task, adapter)
    expected = task.forward(batch).detach()
    assert (expected - plain).abs().max() > 0.05

    lora = lora_to_folder(store.adapter_folder(run_id), tmp_path / "lora", tmp_path / "model")
    settings = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["task_type"] == "CAUSAL_LM" and settings["modules_to_save"] is None
    other = load_task_model(config)
    loaded = peft.PeftModel.from_pretrained(other.model, str(lora)).eval()
    assert type(loaded).__name__ == "PeftModelForCausalLM"
    torch.testing.assert_close(other.forward(batch), expected, rtol=1e-4, atol=1e-5)

    merged = merge_to_folder(store.adapter_folder(run_id), tmp_path / "model", tmp_path / "merged")
    again = load_task_model(config.replace(model__path=str(merged)))
    torch.testing.assert_close(again.forward(batch), expected, rtol=1e-4, atol=1e-4)
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "text-generation" in card and "AutoModelForCausalLM" in card


def rows_of(folder: Path, config: RunConfig) -> list[object]:
    from client.data import read_rows

    return list(read_rows(folder / "site-1" / "test.jsonl", config.task, config.data).rows)


def test_what_few_examples_stand_behind_stays_at_the_site(tmp_path: Path, folder: Path) -> None:
    config = answering(write_decoder(tmp_path), folder, task__share_counts=True, giva__rank=1, giva__oversampling=0)
    evaluations = []
    for least in (4, 5):
        policy = Policy(min_eval_examples=least, max_sketch_share=1.0, allow_share_counts=True)
        site = SiteSettings("site-1", folder / "site-1", config.data, "cpu", policy)
        trainer = LocalTrainer(site, config)
        evaluations.append(trainer.evaluate({}, ""))
    assert "exact_match" in evaluations[0].metrics and "exact_match" not in evaluations[1].metrics
    assert "choice_accuracy" in evaluations[1].metrics
    np.testing.assert_array_equal(evaluations[1].counts["answers"][4:6], [0, 0])
    assert evaluations[0].counts["answers"][5] == 4


def test_a_sketch_wider_than_the_answers_allow_is_refused(tmp_path: Path, folder: Path) -> None:
    config = answering(write_decoder(tmp_path), folder, giva__oversampling=0, giva__power_passes=0)
    # sixteen answers of three or four tokens, but the prompts have a dozen or so different bytes
    site = SiteSettings("site-1", folder / "site-1", config.data, "cpu", Policy())
    LocalTrainer(site, config)
    with pytest.raises(PolicyError, match="sketches as wide"):
        LocalTrainer(site, config.replace(giva__rank=8, giva__calibration_batch_size=8, giva__oversampling=8))


def test_a_site_may_leave_a_kind_of_task_out(tmp_path: Path, folder: Path) -> None:
    config = answering(tmp_path, folder)
    site = SiteSettings("site-1", folder / "site-1", config.data, "cpu", Policy(tasks=("classification",)))
    with pytest.raises(PolicyError, match="the task causal-lm"):
        LocalTrainer(site, config)
