"""Settings that all tests and the processes they start share; they have to stand before torch or flwr is imported."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

import pytest

from giva_core.config import RunConfig
from server.run_store import RunStore

# Nothing a test writes may end in, nor depend on, the folders of the person who runs it.
_HOME = tempfile.TemporaryDirectory(prefix="giva-tests-")
os.environ["GIVA_HOME"] = os.path.join(_HOME.name, "giva")
os.environ["FLWR_HOME"] = os.path.join(_HOME.name, "flwr")

# Server and sites are one machine here; a node with a partition alone stands for its sub-folder.
os.environ["GIVA_SIMULATION"] = "1"

# Toy shapes gain nothing from threads, and several sites share one machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No test asks the network for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


# -- a toy federation: three sites, a one-layer encoder ---------------------------------------------------------------

_WORDS = ["<pad>", "<unk>", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT of random weights and a word-level tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("toy-model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(_WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=42,
        pad_token_id=0,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites of 24, 32 and 40 training rows: early letters are `left`, late ones `right`; shares differ."""
    root = tmp_path_factory.mktemp("toy-sites")
    rng = random.Random(0)
    for number, count in enumerate((24, 32, 40), start=1):
        folder = root / f"site-{number}"
        folder.mkdir()
        for name, rows in (("train", count), ("test", 10 + number)):
            lines = []
            for _ in range(rows):
                left = rng.random() < 0.25 * number
                letters = rng.choices("abcdefghij" if left else "pqrstuvwxyz", k=rng.randint(2, 7))
                lines.append(json.dumps({"text": " ".join(letters), "label": "left" if left else "right"}))
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def toy_config(toy_model: Path, toy_folder: Path) -> RunConfig:
    """A run that takes about a second."""
    return RunConfig.from_nested(
        {
            "model": {"path": str(toy_model)},
            "task": {"labels": ["left", "right"], "share-counts": True, "max-length": 16},
            "giva": {"rank": 4, "calibration-batch-size": 16},
            "train": {"learning-rate": 0.05, "head-learning-rate": 0.01, "batch-size": 8},
            "rounds": {"num-rounds": 3, "head-rounds": 1, "min-sites": 3, "join-seconds": 1.0},
            "data": {"folder": str(toy_folder)},
        }
    )


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """An empty run store."""
    return RunStore(tmp_path / "store")
