from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
import transformers
from image_models import write_vision
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_modules import make_bases

from giva_core import inject
from giva_core.checkpoint import load_adapter, save_adapter
from giva_core.config import GivaConfig, ModelConfig, RunConfig, TaskConfig
from giva_core.errors import CheckpointError, TargetError
from giva_core.export import apply_adapter, merge_to_folder
from giva_core.methods.lora import put_in
from giva_core.models import load_task_model

TEXTS = ["a b c", "d e a a b c d e a"]


def write_model(folder, seed=0, kind=transformers.BertConfig):
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *"abcde"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = kind(vocab_size=len(words), max_position_embeddings=24, pad_token_id=0, **sizes)
    transformers.AutoModel.from_config(settings).save_pretrained(folder)
    return folder


def make_config(folder, head="mean", method="giva", dtype="float32"):
    return RunConfig(
        name="demo",
        method=method,
        model=ModelConfig(path=str(folder), dtype=dtype),
        task=TaskConfig(labels=("no", "yes", "maybe"), head=head),
        giva=GivaConfig(rank=3, target_modules=("query", "intermediate.dense", "output.dense")),
    )


def trained_adapter(folder, config, *, residual=False):
    """Save an adapter whose every number differs from its start; return the adapted model."""
    rng = np.random.default_rng(0)
    task = load_task_model(config)
    digest = task.weights_digest()
    heads = task.head_modules
    layers, ranks = inject.layer_shapes(task.model, config.giva, exclude=heads)
    bases, vectors, kept = None, {}, {}
    names = inject.module_state_names(task.model, heads)
    if config.method == "giva":
        bases = make_bases(layers, ranks, rng)
        inject.inject(task.model, bases, trainable=heads)
        vectors = {
            k: (v + rng.normal(size=v.shape)).astype(np.float32) for k, v in inject.read_vectors(task.model).items()
        }
        inject.write_vectors(task.model, vectors)
        if residual:
            kept = {name: rng.normal(size=layer.B.shape).astype(np.float32) for name, layer in bases.layers.items()}
            inject.write_residual(task.model, kept)
    elif config.method == "lora":
        names = (*put_in(task.model, layers, ranks, config)[0], *names)
    state = inject.read_state(task.model, names)
    state = {name: (value + 0.2 * rng.normal(size=value.shape)).astype(np.float32) for name, value in state.items()}
    inject.write_state(task.model, state)
    save_adapter(
        folder, bases, {**vectors, **state}, config,
        residual={f"{name}.residual": value for name, value in kept.items()}, model_digest=digest, head_modules=heads,
    )  # fmt: skip
    return task


def logits_of(task):
    with torch.no_grad():
        return task.forward(task.collate(task.encode(TEXTS)))


@pytest.mark.parametrize("head", ["mean", "native"])
@pytest.mark.parametrize("method", ["giva", "lora", "head"])
def test_merged_folder_computes_what_the_adapted_model_does(tmp_path, head, method):
    if method == "lora":
        pytest.importorskip("peft")
    config = make_config(write_model(tmp_path / "base"), head, method)
    trained = trained_adapter(tmp_path / "adapter", config)
    expected = logits_of(trained)
    assert (expected - logits_of(load_task_model(config))).abs().max() > 0.1

    applied = load_task_model(config)
    apply_adapter(applied, load_adapter(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(applied), expected, rtol=1e-6, atol=1e-5)

    output = merge_to_folder(tmp_path / "adapter", tmp_path / "base", tmp_path / "out" / "merged")
    merged = load_task_model(config.replace(model__path=str(output)))
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-6, atol=1e-5)
    assert not any("lambda" in name or "lora" in name or "base_layer" in name for name in merged.model.state_dict())
    assert os.listdir(tmp_path / "out") == ["merged"]


def test_residual_and_roberta(tmp_path):
    config = make_config(write_model(tmp_path / "base", kind=transformers.RobertaConfig), "native")
    expected = logits_of(trained_adapter(tmp_path / "adapter", config, residual=True))
    output = merge_to_folder(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    merged = load_task_model(config.replace(model__path=str(output)))
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-6, atol=1e-5)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(output).eval()
    batch = merged.collate(merged.encode(TEXTS))
    torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-6, atol=1e-5)


def test_bfloat16_merge_rounds_once(tmp_path):
    config = make_config(write_model(tmp_path / "base"), dtype="bfloat16")
    trained = trained_adapter(tmp_path / "adapter", config)
    output = merge_to_folder(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    merged = load_task_model(config.replace(model__path=str(output)))
    for name, layer in inject.adapted_layers(trained.model).items():
        expected = (layer.weight.float() + layer.delta_weight()).bfloat16()
        assert torch.equal(merged.model.get_submodule(name).weight, expected)
    assert torch.equal(merged.model.classifier.weight, trained.model.classifier.weight)


def test_model_card_says_what_it_is(tmp_path):
    config = make_config(write_model(tmp_path / "base"))
    trained = trained_adapter(tmp_path / "adapter", config)
    card = (merge_to_folder(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged") / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "GiVA",
        "rank 3",
        trained.weights_digest(),
        "MeanPoolingClassifier",
        "licence",
    ):
        assert part in card
    assert str(tmp_path) not in card


def test_the_card_of_a_model_that_sees_names_its_image_processor(tmp_path, monkeypatch):
    config = make_config(write_vision(tmp_path / "base"), "native", "head")
    config = config.replace(task__kind="image-classification", giva__target_modules="all-linear")
    trained = trained_adapter(tmp_path / "adapter", config)
    merge_to_folder(tmp_path / "adapter", tmp_path / "base", tmp_path / "this-folder")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "this-folder" / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    pixels = names["processor"](Image.new("RGB", (30, 20), "teal"), return_tensors="pt")
    torch.testing.assert_close(names["model"](**pixels).logits, trained.model(**pixels).logits)


def test_another_base_model_is_refused(tmp_path):
    trained_adapter(tmp_path / "adapter", make_config(write_model(tmp_path / "base")))
    write_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"another base model.*Remedy"):
        merge_to_folder(tmp_path / "adapter", tmp_path / "other", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_model_is_adapted_once(tmp_path):
    config = make_config(write_model(tmp_path / "base"))
    task = trained_adapter(tmp_path / "adapter", config)
    with pytest.raises(TargetError, match="adapted already"):
        apply_adapter(task, load_adapter(tmp_path / "adapter"))


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    config = make_config(write_model(tmp_path / "base"))
    trained_adapter(tmp_path / "adapter", config)
    output = tmp_path / "out" / "merged"

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        merge_to_folder(tmp_path / "adapter", tmp_path / "base", output)
    assert os.listdir(tmp_path / "out") == []


def test_output_must_be_empty(tmp_path):
    config = make_config(write_model(tmp_path / "base"))
    trained_adapter(tmp_path / "adapter", config)
    with pytest.raises(CheckpointError, match="not empty"):
        merge_to_folder(tmp_path / "adapter", tmp_path / "base", tmp_path / "base")
    (tmp_path / "merged").mkdir()
    assert (
        merge_to_folder(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged") / "model.safetensors"
    ).exists()
