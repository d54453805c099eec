"""Small federations of the kinds of tasks beside classification: a model, two sites' rows, a short run, site files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from answering_models import write_decoder, write_rows, write_t5
from image_models import write_pictures, write_vision

from giva_core.config import METHODS, RunConfig
from giva_core.types import Arrays
from server.run_store import RunStore

#: What a site's operator says in these tests: the models have layers of 16 columns.
OPEN = {"max-sketch-share": 50.0, "allow-share-counts": True, "methods": list(METHODS)}
SITES = ("site-1", "site-2")
ROWS = {"train": (16, 24), "test": (9, 11)}

_ANSWERS = {"max-length": 24, "generate-examples": 8, "max-new-tokens": 3, "multiple-choice": "sum"}


@dataclass(frozen=True)
class Kind:
    """A kind of task, as a run and as a site has it.

    Attributes:
        task: The run's table `[task]`.
        metrics: What an evaluation has.
        data: The site files' table `[data]`, without the folder.
    """

    task: Mapping[str, Any]
    metrics: frozenset[str]
    data: Mapping[str, str] = field(default_factory=dict)


_ANSWERED = frozenset({"token_accuracy", "perplexity", "exact_match", "choice_accuracy"})
KINDS = {
    # a template with what TOML, JSON and a command line each write in another way
    "causal-lm": Kind({**_ANSWERS, "kind": "causal-lm", "prompt-template": 'Q: {prompt}\n"A" = '}, _ANSWERED),
    "chat": Kind(
        {**_ANSWERS, "kind": "causal-lm", "prompt-format": "chat", "beams": 2, "multiple-choice": "none"},
        _ANSWERED - {"choice_accuracy"},
        {"messages-column": "messages"},
    ),
    "seq2seq": Kind({**_ANSWERS, "kind": "seq2seq"}, _ANSWERED, {"options-column": "choices"}),
    "image-classification": Kind(
        {"kind": "image-classification", "labels": ["above", "below"]},
        frozenset({"accuracy", "macro_f1", "mcc"}),
        {"train-file": "train", "eval-file": "test"},
    ),
}


def write_kind(root: Path, case: str) -> Path:
    """A model, and two sites' rows in `root/sites`; returns the model's folder."""
    for split, counts in ROWS.items():
        for seed, (site, count) in enumerate(zip(SITES, counts, strict=True)):
            folder = root / "sites" / site
            if case == "image-classification":
                write_pictures(folder / split, count, seed)
                continue
            file = write_rows(folder / f"{split}.jsonl", count, seed, options=case != "chat", chat=case == "chat")
            if case == "seq2seq":
                file.write_text(file.read_text().replace('"options"', '"choices"'))
    if case == "image-classification":
        return write_vision(root / "vit")
    return write_t5(root / "t5") if case == "seq2seq" else write_decoder(root / "decoder")


def kind_config(case: str, root: Path, model: Path, **settings: object) -> RunConfig:
    """Two rounds with an evaluation each, as a simulation reads it."""
    config = RunConfig.from_nested(
        {
            "model": {"path": str(model)},
            "task": {**KINDS[case].task, "share-counts": True},
            "giva": {"rank": 2, "oversampling": 2, "calibration-batch-size": 16},
            "train": {"learning-rate": 0.1, "batch-size": 8, "num-threads": 1},
            "rounds": {"num-rounds": 2, "min-sites": 2, "join-seconds": 1.0},
            "data": {"folder": str(root / "sites"), **KINDS[case].data},
        }
    )
    return config.replace(**settings)


def deployed(config: RunConfig) -> RunConfig:
    """The same run without what is the sites' own affair."""
    plain = {key.replace(".", "__").replace("-", "_"): value for key, value in RunConfig().to_flat().items()}
    return config.replace(**{key: value for key, value in plain.items() if key.startswith("data__")})


def state_of(store: RunStore, run_id: str) -> Arrays:
    """What a run that is done came to."""
    assert store.run(run_id).status == "completed", store.run(run_id).reason
    stored = store.last_state(run_id)
    assert stored is not None
    return {**stored.arrays, **stored.extra}


def assert_the_same(store: RunStore, first: str, second: str) -> None:
    """Both runs have the same arrays, losses and metrics, and no site ever failed."""
    one, other = state_of(store, first), state_of(store, second)
    assert one.keys() == other.keys()
    assert {name for name in one if one[name].tobytes() != other[name].tobytes()} == set()
    for record, twin in zip(store.rounds(first), store.rounds(second), strict=True):
        assert {site.status for site in (*record.sites, *twin.sites)} <= {"ok"}
        assert (record.phase, record.round) == (twin.phase, twin.round)
        assert (record.train_loss, record.eval_loss) == (twin.train_loss, twin.eval_loss)
        assert dict(record.metrics) == dict(twin.metrics)
