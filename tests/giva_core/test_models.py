from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from giva_core import exact
from giva_core.config import ModelConfig, RunConfig, TaskConfig
from giva_core.errors import ConfigError
from giva_core.models import MeanPoolingClassifier, load_task_model

WORDS = ["<pad>", "<unk>", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
SMALL = {"vocab_size": len(WORDS), "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
WIDE = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 42}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**WIDE),
    "roberta": lambda: transformers.RobertaConfig(**WIDE, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=len(WORDS), n_layers=1, n_heads=2, dim=16, hidden_dim=24, max_position_embeddings=42, pad_token_id=0
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **WIDE, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, global_attn_every_n_layers=1
    ),
}


def write_model(folder, kind="bert", cls=transformers.AutoModel, seed=0, **changes):
    """A tiny pretrained model with a word-level tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    settings = CONFIGS[kind]()
    for key, value in changes.items():
        setattr(settings, key, value)
    cls.from_config(settings).save_pretrained(folder)
    return folder


def config_for(folder, head="mean", kind="classification", labels=("no", "yes", "maybe"), **model):
    task = TaskConfig(kind=kind, labels=labels, head=head)
    return RunConfig(model=ModelConfig(path=str(folder), **model), task=task)


def logits_of(task, texts=("a b c", "d e f g h i j k l")):
    with torch.no_grad():
        return task.forward(task.collate(task.encode(list(texts))))


@pytest.mark.parametrize("head", ["mean", "native"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_architectures_load_quietly_and_save_and_load_back(tmp_path, capfd, kind, head):
    config = config_for(write_model(tmp_path / "model", kind), head)
    capfd.readouterr()
    task = load_task_model(config)
    logits = logits_of(task)

    assert logits.shape == (2, 3) and logits.dtype == torch.float32
    assert not {"classifier.weight", "classifier.bias"} & task.frozen.keys()
    trained = {name for name, value in task.model.named_parameters() if value.requires_grad}
    assert trained and all(any(name.startswith(f"{head}.") for head in task.head_modules) for name in trained)
    with torch.no_grad():
        for name in trained:
            task.model.get_parameter(name).add_(0.25)
    task.save(tmp_path / "saved")
    again = load_task_model(config.replace(model__path=str(tmp_path / "saved")))
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(logits_of(again), logits_of(task), rtol=0, atol=0)
    assert again.weights_digest() == task.weights_digest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_native_head_is_float32_on_any_backbone(tmp_path, kind, dtype):
    task = load_task_model(config_for(write_model(tmp_path, kind), "native", dtype=dtype))
    types = {name: value.dtype for name, value in task.model.named_parameters()}
    for name, found in types.items():
        in_head = any(name.startswith(f"{head}.") for head in task.head_modules)
        assert found == (torch.float32 if in_head else getattr(torch, dtype)), name
    logits = task.forward(task.collate(task.encode(["a b", "c"])))
    logits.sum().backward()
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


def test_mean_head_is_the_written_formula(tmp_path):
    task = load_task_model(config_for(write_model(tmp_path)))
    assert task.head_modules == ("classifier",)
    assert not any("pooler" in name for name in task.frozen)
    assert 0 < task.model.classifier.weight.abs().max() <= 1 / task.model.classifier.in_features**0.5
    assert torch.count_nonzero(task.model.classifier.bias) == 0
    torch.nn.init.normal_(task.model.classifier.weight)
    batch = task.collate(task.encode(["a b c", "d e f g h i j k l"]))
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        hidden = task.model.base_model(**inputs).last_hidden_state.numpy()
    for row, mask, logits in zip(hidden, batch["attention_mask"].numpy(), logits_of(task).numpy(), strict=True):
        mean = row[mask == 1].mean(0)
        expected = task.model.classifier.weight.detach().numpy() @ (10 * mean / np.linalg.norm(mean))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_mean_head_computes_in_float32_under_autocast(tmp_path):
    task = load_task_model(config_for(write_model(tmp_path)))
    seen = []
    task.model.classifier.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(task)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, task.model.classifier(seen[0]).detach(), rtol=1e-6, atol=1e-6)


def test_saved_mean_model_opens_as_a_plain_encoder_and_by_its_own_class(tmp_path):
    task = load_task_model(config_for(write_model(tmp_path / "model")))
    torch.nn.init.normal_(task.model.classifier.weight)
    task.save(tmp_path / "saved")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "saved", add_pooling_layer=False)
    torch.testing.assert_close(encoder.state_dict(), task.model.base_model.state_dict())
    own = MeanPoolingClassifier.from_pretrained(tmp_path / "saved").eval()
    inputs = task.collate(task.encode(["x y z"]))
    torch.testing.assert_close(own(**inputs).logits, task.forward(inputs))
    assert own.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_new_native_heads_start_equal_whatever_torch_draws(tmp_path, kind):
    config = config_for(write_model(tmp_path, kind), "native")
    torch.manual_seed(1)
    first = load_task_model(config)
    torch.manual_seed(2)
    second = load_task_model(config)
    other = load_task_model(config.replace(giva__seed=5))
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    name = "classifier.dense.weight" if kind == "roberta" else "head.dense.weight"
    expected = exact.uniform(0, f"head:{name}", (16, 16)) * np.float32(0.25)
    np.testing.assert_array_equal(first.model.get_parameter(name).detach().numpy(), expected)
    assert not torch.equal(other.model.get_parameter(name), first.model.get_parameter(name))
    if kind == "modernbert":
        assert torch.equal(first.model.get_parameter("head.norm.weight"), torch.ones(16))


def test_pretrained_heads_are_kept_where_they_fit(tmp_path):
    write_model(tmp_path, cls=transformers.AutoModelForSequenceClassification, num_labels=3)
    stored = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    kept = load_task_model(config_for(tmp_path, "native"))
    assert torch.equal(kept.model.classifier.weight, stored.classifier.weight)
    fresh = load_task_model(config_for(tmp_path, "native", labels=("a", "b", "c", "d")))
    expected = exact.uniform(0, "head:classifier.weight", (4, 16)) * np.float32(0.25)
    np.testing.assert_array_equal(fresh.model.classifier.weight.detach().numpy(), expected)


def test_a_pooler_that_the_checkpoint_lacks_belongs_to_the_head(tmp_path):
    class WithoutPooler(transformers.AutoModel):
        @classmethod
        def from_config(cls, settings):
            return transformers.BertModel(settings, add_pooling_layer=False)

    task = load_task_model(config_for(write_model(tmp_path, cls=WithoutPooler), "native", dtype="bfloat16"))
    assert task.head_modules == ("classifier", "bert.pooler.dense")
    assert task.model.bert.pooler.dense.weight.dtype == torch.float32
    assert logits_of(task).dtype == torch.float32


def test_encode_and_collate(tmp_path):
    task = load_task_model(config_for(write_model(tmp_path)))
    encoded = task.encode(["a b", "c"], ["d", "e f g"])
    assert encoded[0] == {"input_ids": [2, 4, 5, 3, 7, 3], "token_type_ids": [0, 0, 0, 0, 1, 1]}
    batch = task.collate(encoded, [2, 0])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"][0].tolist() == [2, 4, 5, 3, 7, 3, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 7 + [0]]
    assert batch["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert batch["labels"].tolist() == [2, 0] and batch["labels"].dtype == torch.long
    assert len(task.encode(["a b c d e f"], max_length=5)[0]["input_ids"]) == 5
    assert task.encode([]) == []


def test_a_text_that_spells_a_special_token_has_none_of_it(tmp_path):
    task = load_task_model(config_for(write_model(tmp_path)))
    ends = task.processor.sep_token_id
    assert task.encode([f"a {task.processor.sep_token} b"])[0]["input_ids"].count(ends) == 1


@pytest.mark.parametrize(("kind", "positions"), [("bert", 42), ("roberta", 41), ("modernbert", 42)])
def test_texts_are_cut_and_padded_to_what_the_model_takes(tmp_path, kind, positions):
    task = load_task_model(config_for(write_model(tmp_path, kind)))
    encoded = task.encode(["a " * 99, "b"], max_length=128)
    batch = task.collate(encoded)
    assert task.max_positions == len(encoded[0]["input_ids"]) == batch["input_ids"].shape[1] == positions
    assert task.forward(batch).shape == (2, 3)


def test_padding_does_not_change_logits(tmp_path):
    task = load_task_model(config_for(write_model(tmp_path), "native"))
    short, long = "a b c", "d " * 30
    torch.testing.assert_close(logits_of(task, [short, long])[:1], logits_of(task, [short]))


def test_losses_of_the_three_tasks(tmp_path):
    write_model(tmp_path)
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -0.5]])
    task = load_task_model(config_for(tmp_path))
    batch = task.collate(task.encode(["a", "b"]), np.array([2, 1]))
    probabilities = logits.softmax(-1)
    each = -torch.stack([probabilities[0, 2], probabilities[1, 1]]).log()
    torch.testing.assert_close(task.task_loss(logits, batch["labels"]), each.mean())
    torch.testing.assert_close(task.task_loss(logits.bfloat16(), batch["labels"], "sum"), each.sum())

    task = load_task_model(config_for(tmp_path, kind="multilabel"))
    labels = task.collate(task.encode(["a", "b"]), [[1, 0, 1], [0, 0, 0]])["labels"]
    sigmoid = logits.sigmoid()
    each = -(labels * sigmoid.log() + (1 - labels) * (1 - sigmoid).log()).mean(-1)
    torch.testing.assert_close(task.task_loss(logits, labels, "sum"), each.sum())

    task = load_task_model(config_for(tmp_path, kind="regression", labels=()))
    labels = task.collate(task.encode(["a", "b"]), [1, -1.5])["labels"]
    assert task.num_outputs == 1 and logits_of(task).shape == (2, 1)
    torch.testing.assert_close(task.task_loss(torch.tensor([[2.0], [0.5]]), labels), torch.tensor(2.5))


def test_weights_digest_sees_the_backbone_and_not_the_head(tmp_path):
    write_model(tmp_path / "one")
    one = load_task_model(config_for(tmp_path / "one"))
    more = load_task_model(config_for(tmp_path / "one", labels=("a", "b", "c", "d")))
    other = load_task_model(config_for(write_model(tmp_path / "two", seed=1)))
    half = load_task_model(config_for(tmp_path / "one", dtype="bfloat16"))
    digests = [task.weights_digest() for task in (one, other, half)]
    assert len(set(digests)) == 3 and more.weights_digest() == digests[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "model.path is not set"),
        ("./nowhere", "no model folder"),
        ("/nowhere/at/all", "no model folder"),
        ("someone/some-model", "local-files-only = false"),
    ],
)
def test_missing_models_are_explained(path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_task_model(config_for(path))
    assert "some" not in caught.value.public and "/" not in caught.value.public


def test_unusable_models_are_refused(tmp_path):
    write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="needs its labels"):
        load_task_model(config_for(tmp_path / "model", labels=("one",)))

    pickled = write_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_task_model(config_for(pickled))

    damaged = write_model(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_task_model(config_for(damaged))

    mixed = write_model(tmp_path / "mixed")
    settings = CONFIGS["bert"]()
    settings.num_hidden_layers = 2
    settings.save_pretrained(mixed)
    with pytest.raises(ConfigError, match="do not cover the backbone"):
        load_task_model(config_for(mixed))

    mute = write_model(tmp_path / "mute")
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="tokenizer knows no words"):  # else every text would be the same one
        load_task_model(config_for(mute))

    foreign = write_model(tmp_path / "foreign", vocab_size=9)
    with pytest.raises(ConfigError, match="more tokens than the model"):
        load_task_model(config_for(foreign))
