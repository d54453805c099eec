"""An encoder and a decoder that learn answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from answering_models import write_decoder, write_rows, write_t5

from client.alone import site_at, train_alone
from giva_core.config import RunConfig
from giva_core.errors import ConfigError
from giva_core.lora_export import TASK_TYPES
from giva_core.models import load_task_model
from giva_core.rows import Dialogue


def config_for(folder, **task) -> RunConfig:
    settings = {"kind": "seq2seq", "max-length": 32, **task}
    return RunConfig.from_nested({"model": {"path": str(folder)}, "task": settings})


def asked(prompt: str, answer: str) -> Dialogue:
    return Dialogue((("user", prompt), ("assistant", answer)))


ROWS = [asked("abc", "yes"), asked("what is it", "no, never"), asked("x", "?")]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5"))


def test_outputs_are_the_answer_s_likelihood_token_by_token(t5, tmp_path):
    task = load_task_model(config_for(t5))
    encoded = task.encode_rows(ROWS, 32)
    end = task.processor.eos_token_id
    assert all(item["target_ids"][-1] == end for item in encoded)
    with torch.no_grad():
        outputs = task.forward(task.collate(encoded)).numpy()
        for item, found in zip(encoded, outputs, strict=True):
            given, total, right = [task.model.config.decoder_start_token_id], 0.0, 0
            for token in item["target_ids"]:
                source, decoded = torch.tensor([item["input_ids"]]), torch.tensor([given])
                logits = task.model(input_ids=source, decoder_input_ids=decoded).logits[0, -1]
                total -= float(logits.log_softmax(-1)[token])
                right += int(logits.argmax()) == token
                given.append(token)
            np.testing.assert_allclose(found, [total, len(item["target_ids"]), right], rtol=1e-4)
    task.save(tmp_path)
    assert load_task_model(config_for(tmp_path)).weights_digest() == task.weights_digest()


def test_both_halves_learn_and_answers_are_generated(t5, tmp_path):
    for name, count in (("train", 32), ("test", 10)):
        write_rows(tmp_path / f"{name}.jsonl", count, count, options=True)
    settings = {
        "model.path": str(t5),
        "task.kind": "seq2seq",
        "task.max-length": 16,
        "task.multiple-choice": "mean",
        "task.generate-examples": 4,
        "task.beams": 2,
        "task.max-new-tokens": 4,
        "giva.rank": 2,
        "train.learning-rate": 0.3,
        "train.batch-size": 8,
        "train.gradient-checkpointing": True,
        "rounds.num-rounds": 2,
    }
    config = RunConfig.from_flat(settings)
    result = train_alone(config, site_at(tmp_path, config))
    first, last = (done.evaluation for done in result.rounds)
    assert first and last and last.loss < first.loss
    assert last.metrics.keys() == {"token_accuracy", "perplexity", "exact_match", "choice_accuracy"}
    moved = {name for name, array in result.arrays.items() if name.endswith("lambda_o") and np.abs(array).max() > 0}
    assert {name.split(".")[0] for name in moved} == {"encoder", "decoder"} and not any("lm_head" in n for n in moved)


def test_the_rank_of_the_gradient_is_bounded_by_the_tokens_that_are_read(t5):
    task = load_task_model(config_for(t5))
    encoded = task.encode_rows([asked("abcabc", "aab")] * 3, 32)
    source = len(set(encoded[0]["input_ids"]))
    # the decoder reads its start, a and b, of which the start is known; its end token is only written
    assert task.gradient_terms(encoded, ["decoder.block.0.layer.0.SelfAttention.q"]) == 2
    assert task.gradient_terms(encoded, ["encoder.block.0.layer.0.SelfAttention.q"]) == len(set("abc"))
    for name, bound in (
        ("decoder.block.0.layer.0.SelfAttention.v", 3),
        ("encoder.block.0.layer.0.SelfAttention.v", source),
    ):
        weight = task.model.get_parameter(f"{name}.weight").requires_grad_(True)
        task.task_loss(task.forward(task.collate(encoded)), torch.zeros(3), "sum").backward()
        assert np.linalg.matrix_rank(weight.grad.numpy(), tol=1e-5 * float(weight.grad.abs().max())) <= bound


def test_what_does_not_fit_is_refused(t5, tmp_path):
    with pytest.raises(ConfigError, match="no encoder that a decoder answers to"):
        load_task_model(config_for(write_decoder(tmp_path)))
    with pytest.raises(ConfigError, match="reads plain prompts"):
        config_for(t5, **{"prompt-format": "chat"})
    assert TASK_TYPES["seq2seq"] == "SEQ_2_SEQ_LM"
