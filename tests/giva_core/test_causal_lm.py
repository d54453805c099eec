"""Decoders that learn answers: what is learned, what is counted, and that it is the same for every architecture."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from answering_models import DECODERS, write_decoder, write_tokenizer

from giva_core.config import RunConfig
from giva_core.errors import ConfigError
from giva_core.models import load_task_model
from giva_core.models.answers import is_match
from giva_core.rows import Dialogue


def config_for(folder, **task) -> RunConfig:
    return RunConfig.from_nested(
        {"model": {"path": str(folder)}, "task": {"kind": "causal-lm", "max-length": 48, **task}}
    )


def asked(prompt: str, answer: str, *options: str) -> Dialogue:
    return Dialogue((("user", prompt), ("assistant", answer)), options)


ROWS = [asked("abc", "yes"), asked("what is it", "no, never"), asked("x", "?")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("llama"))


def by_hand(task, row: Dialogue, prompt: str) -> tuple[float, int, int]:
    """−log p of the answer's tokens, their number, and how many were the likeliest, token by token."""
    ids = task.processor(prompt)["input_ids"]
    answer = [*task.processor(row.answer, add_special_tokens=False)["input_ids"], task.processor.eos_token_id]
    total, right = 0.0, 0
    for token in answer:
        with torch.no_grad():
            logits = task.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[token])
        right += int(logits.argmax()) == token
        ids = [*ids, token]
    return total, len(answer), right


@pytest.mark.parametrize("kind", list(DECODERS))
def test_every_architecture_gives_the_answer_s_likelihood(tmp_path, kind):
    task = load_task_model(config_for(write_decoder(tmp_path / "model", kind)))
    assert task.head_modules == () and not any(value.requires_grad for value in task.model.parameters())
    encoded = task.encode_rows(ROWS, 48)
    with torch.no_grad():
        outputs = task.forward(task.collate(encoded))
    expected = np.array([by_hand(task, row, f"{row.turns[0][1]}\n") for row in ROWS])
    np.testing.assert_allclose(outputs.numpy(), expected, rtol=1e-4)
    each = expected[:, 0] / expected[:, 1]
    assert float(task.task_loss(outputs, torch.zeros(3), "sum")) == pytest.approx(each.sum(), rel=1e-4)
    assert float(task.task_loss(outputs, torch.zeros(3))) == pytest.approx(each.mean(), rel=1e-4)

    task.save(tmp_path / "saved")
    again = load_task_model(config_for(tmp_path / "saved"))
    assert again.weights_digest() == task.weights_digest()
    torch.testing.assert_close(again.forward(again.collate(encoded)), outputs, rtol=0, atol=0)


def test_only_answers_are_learned_and_end_tokens_with_them(llama):
    task = load_task_model(config_for(llama, **{"prompt-template": "Q: {prompt} A: "}))
    (item,) = task.encode_rows([asked("ab", "yes")], 48)
    assert task.processor.decode(item["input_ids"]) == "Q: ab A: yes</s>"
    learned = [token for token, is_answer in zip(item["input_ids"], item["answers"], strict=True) if is_answer]
    assert task.processor.decode(learned) == "yes</s>" and sum(item["answers"]) == 4


def test_chats_are_written_by_the_tokenizer_s_template(llama):
    task = load_task_model(config_for(llama, **{"prompt-format": "chat"}))
    turns = (("system", "be"), ("user", "ab"), ("assistant", "yes"), ("user", "c"), ("assistant", "no"))
    (item,) = task.encode_rows([Dialogue(turns)], 48)
    assert task.processor.decode(item["input_ids"]) == (
        "<|system|>be<|user|>ab<|assistant|>yes</s>\n<|user|>c<|assistant|>no</s>\n"
    )
    learned = [token for token, is_answer in zip(item["input_ids"], item["answers"], strict=True) if is_answer]
    assert task.processor.decode(learned) == "yes</s>no</s>"
    prompts = task.prompts([item])
    assert task.processor.decode(prompts["input_ids"][0][prompts["attention_mask"][0] == 1]).endswith("c<|assistant|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}", "writes earlier messages anew"),
        ("{{ raise_exception('no system messages') }}", "no chat template that fits"),
        (None, "no chat template that fits"),
    ],
)
def test_templates_that_hide_where_an_answer_begins_are_refused(tmp_path, template, message):
    write_decoder(tmp_path)
    write_tokenizer(tmp_path, chat=False)
    task = load_task_model(config_for(tmp_path, **{"prompt-format": "chat"}))
    task.processor.chat_template = template
    with pytest.raises(ConfigError, match=message) as caught:
        task.encode_rows([Dialogue((*ROWS[0].turns, ("user", "SECRET"), ("assistant", "SECRET")))], 48)
    assert "SECRET" not in str(caught.value)


def test_long_examples_lose_the_beginning_of_the_prompt_first(llama):
    task = load_task_model(config_for(llama))
    (item,) = task.encode_rows([asked("a" * 90, "yes")], 12)
    assert task.processor.decode(item["input_ids"]) == "a" * 7 + "\nyes</s>"
    (item,) = task.encode_rows([asked("a" * 90, "b" * 50)], 12)
    assert task.processor.decode(item["input_ids"]) == "\n" + "b" * 11 and sum(item["answers"]) == 11
    (item,) = task.encode_rows([asked("a", "b" * 500)], 10**6)
    assert len(item["input_ids"]) == task.max_positions == 96


def test_padding_and_neighbours_change_nothing(llama):
    task = load_task_model(config_for(llama))
    encoded = task.encode_rows(ROWS, 48)
    with torch.no_grad():
        together = task.forward(task.collate(encoded, [0, 0, 0]))
        alone = torch.cat([task.forward(task.collate([item])) for item in encoded])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_generation_is_the_likeliest_token_each_time(tmp_path, kind):
    settings = {"generate-examples": 2, "max-new-tokens": 4}
    task = load_task_model(config_for(write_decoder(tmp_path, kind), **settings))
    task.model.generation_config.repetition_penalty = 5.0  # what a folder brings does not count
    written = []
    for row in ROWS[:2]:
        ids = task.processor(f"{row.turns[0][1]}\n")["input_ids"]
        begin = len(ids)
        while len(ids) < begin + 4 and (len(ids) == begin or ids[-1] != task.processor.eos_token_id):
            with torch.no_grad():
                ids = [*ids, int(task.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        written.append(task.processor.decode(ids[begin:], skip_special_tokens=True))
    assert written[0] != written[1]
    rows = [asked(ROWS[0].turns[0][1], written[0]), asked(ROWS[1].turns[0][1], written[0]), ROWS[2]]
    judged = task.judged(np.ones((3, 3), np.float32), task.encode_rows(rows, 48), np.full(3, -1), 2)
    np.testing.assert_array_equal(judged[:, 3:], [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert task.model.generation_config.repetition_penalty == 5.0


def test_beams_find_answers_at_least_as_likely(llama):
    prompts, likelihoods = ["abc", "what is it"], {}
    for beams in (1, 4):
        task = load_task_model(config_for(llama, beams=beams, **{"generate-examples": 2, "max-new-tokens": 3}))
        batch = task.prompts(task.encode_rows([asked(prompt, "y") for prompt in prompts], 48))
        with task._generation(), torch.no_grad():
            ids = task.model.generate(**batch)
            mask = torch.cat([batch["attention_mask"], torch.ones(2, ids.shape[1] - batch["input_ids"].shape[1])], 1)
            logp = task.model(input_ids=ids, attention_mask=mask.long()).logits.log_softmax(-1)
        begin = batch["input_ids"].shape[1]
        likelihoods[beams] = logp[:, begin - 1 : -1].gather(-1, ids[:, begin:, None]).sum((1, 2))
    assert (likelihoods[4] >= likelihoods[1] - 1e-4).all()


@pytest.mark.parametrize("by", ["sum", "mean"])
def test_the_likeliest_option_is_the_answer(llama, by):
    task = load_task_model(config_for(llama, **{"multiple-choice": by}))
    options = ("no", "yes, surely", "b")
    rows = [asked(prompt, "no", *options) for prompt in ("abc", "x y", "what")]
    costs = np.array(
        [[by_hand(task, asked("", option), f"{row.turns[0][1]}\n")[:2] for option in options] for row in rows]
    )
    best = (costs[..., 0] / (costs[..., 1] if by == "mean" else 1)).argmin(1)
    labels = np.array([best[0], (best[1] + 1) % 3, -1])
    judged = task.judged(np.ones((3, 3), np.float32), task.encode_rows(rows, 48), labels, 2)
    np.testing.assert_array_equal(judged[:, 5:], [[1, 1], [0, 1], [0, 0]])


@pytest.mark.parametrize(
    ("text", "reference", "compare", "expected"),
    [
        (" The  Answer ", "the answer", "text", True),
        ("the answer.", "the answer", "text", False),
        ("so 3 + 4 = 7", "#### 7.0", "number", True),
        ("it costs $1,250", "1250", "number", True),
        ("-3", "3", "number", False),
        ("none", "none", "number", False),
    ],
)
def test_matches(text, reference, compare, expected):
    assert is_match(text, reference, compare) is expected


def test_checkpointing_computes_the_same_gradient_and_can_be_switched_off(llama):
    from giva_core import inject

    task = load_task_model(config_for(llama))
    batch = task.collate(task.encode_rows(ROWS, 48))
    parameter = task.model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(True)
    task.model.train()
    gradients, saved = [], []
    for on in (False, True, False):
        task.checkpoint_activations(on)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            loss = task.task_loss(task.forward(batch), torch.zeros(3), "sum")
        loss.backward()
        gradients.append(parameter.grad.clone())
        saved.append(sum(kept))
        parameter.grad = None
    torch.testing.assert_close(gradients[1], gradients[0])
    assert saved[1] < saved[0] == saved[2]
    assert not inject.adapted_layers(task.model)


def test_the_server_s_own_words_do_not_count_as_a_site_s(llama):
    rows = [asked("abcd", "efgh" * 8)]
    plain = load_task_model(config_for(llama))
    padded = load_task_model(config_for(llama, **{"prompt-template": "jklmnopqrstuvw {prompt} "}))
    terms = [task.gradient_terms(task.encode_rows(rows, 96), []) for task in (plain, padded)]
    assert len(padded.encode_rows(rows, 96)[0]["input_ids"]) > len(plain.encode_rows(rows, 96)[0]["input_ids"])
    assert terms == [8, 8]


def test_the_rank_of_the_gradient_is_bounded_by_what_predicts_answers(llama):
    task = load_task_model(config_for(llama))
    short = task.encode_rows([asked("abcdefgh", "y"), asked("ijklmnop", "z")], 48)
    assert task.gradient_terms(short, []) == 4  # two answers and two end tokens
    same = task.encode_rows([asked("a", "b" * 20)] * 3, 48)
    assert (
        task.gradient_terms(same, []) == 2
    )  # a, b: of the three vectors that the first layer reads the server knows one
    matrix = gradient(task, same, "model.layers.0.self_attn.v_proj")
    assert np.linalg.matrix_rank(matrix, tol=1e-5 * np.abs(matrix).max()) <= 3
    matrix = gradient(task, short, "model.layers.1.mlp.up_proj")
    assert np.linalg.matrix_rank(matrix, tol=1e-5 * np.abs(matrix).max()) <= 4


def gradient(task, encoded, layer: str) -> np.ndarray:
    weight = task.model.get_parameter(f"{layer}.weight").requires_grad_(True)
    task.task_loss(task.forward(task.collate(encoded)), torch.zeros(len(encoded)), "sum").backward()
    weight.requires_grad_(False)
    return weight.grad.numpy()


def test_models_that_do_not_write_are_refused(toy_model):
    with pytest.raises(ConfigError, match="do not cover a causal-lm model"):
        load_task_model(config_for(toy_model))


def test_perplexity_of_a_uniform_model_is_its_vocabulary(llama):
    task = load_task_model(config_for(llama))
    with torch.no_grad():
        task.model.get_input_embeddings().weight.zero_()
        outputs = task.forward(task.collate(task.encode_rows(ROWS, 48)))
    size = task.model.config.vocab_size
    np.testing.assert_allclose(outputs[:, 0] / outputs[:, 1], math.log(size), rtol=1e-5)


def test_settings_that_cannot_be_are_refused(llama):
    base = config_for(llama)
    with pytest.raises(ConfigError, match="no head of its own"):
        base.replace(rounds__head_rounds=1)
    with pytest.raises(ConfigError, match="no place for the prompt"):
        base.replace(task__prompt_template="Question:")
    with pytest.raises(ConfigError, match="no room"):
        base.replace(task__max_length=7)
    assert replace(base.task, max_length=8).max_length == 8
