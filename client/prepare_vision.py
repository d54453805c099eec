"""`giva data prepare vision`: Fashion-MNIST, half of its classes for a ViT to start from, the others for sites.

Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", arXiv:1708.07747, from
Debian's package of it. No pretrained ViT can be had from the package indexes, so one is trained here, on this machine,
from the images of five classes; its bytes therefore differ from machine to machine, and sites of a federation have to
copy one folder. The five other classes, which it has never seen, are what the sites adapt it to.
"""

from __future__ import annotations

import gzip
import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from giva_core.errors import ConfigError, DataError, DependencyError

from .archives import Archive, deb_files, obtain
from .needs import require_training
from .new_files import new_folder
from .partition import dirichlet_partition, stratified_take
from .prepared import SPLITS, Prepared, prepared_before, write_dataset

IMAGES = Archive(
    package="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    filename="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    licence="MIT",
    content="the pictures of Fashion-MNIST, arXiv:1708.07747",
)

#: Names of the classes, in the order of their numbers in the files.
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot")
#: What the model starts from, and what the sites adapt it to: the pieces that are hard to tell apart, and a shoe.
PRETRAINED = ("T-shirt", "Trouser", "Sandal", "Bag", "Ankle-boot")
ADAPTED = ("Coat", "Dress", "Pullover", "Shirt", "Sneaker")

#: Images that the model is trained on, and training examples of all sites by default.
PRETRAINING_IMAGES, TRAIN_EXAMPLES = 6000, 1500
_OTHERS = {"validation": 300, "test": 1000}
_SITES, _ALPHA = 4, 0.5
_FILES = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
#: Which of the data set's own parts a split is taken from.
_PART = {"train": "train", "validation": "train", "test": "t10k"}
_FOLDER = "./usr/share/datasets/fashion-mnist/"


def prepare_vision(
    *,
    home: Path,
    train_examples: int | None = None,
    seed: int = 0,
    archives: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Prepared:
    """Put a small ViT into `home/models` and folders of images, at four sites of skewed labels, into `home/data`.

    Args:
        home: Where everything is kept, the archive included.
        train_examples: Training examples of all sites, at least 200.
        seed: Seed of every draw, and of the model.
        archives: A folder that holds the archive, instead of Debian's.
        force: Make the data anew if they are there; the model stays.
        progress: Takes a sentence on what is being done.

    Raises:
        ConfigError: An argument is out of range.
        DataError: The archive cannot be fetched or is not the pinned one.
        DependencyError: Torch, transformers or Pillow is not installed.
    """
    train_examples = TRAIN_EXAMPLES if train_examples is None else train_examples
    if not 200 <= train_examples <= 20_000 or seed < 0:
        raise ConfigError(
            "train-examples or seed is out of range",
            got=f"{train_examples}, {seed}",
            expected="200 to 20000 examples, and a seed of at least 0",
        )
    if find_spec("PIL") is None:
        raise DependencyError("writing images needs Pillow", remedy="pip install 'fedgiva[vision]'")
    model, target = home / "models" / "small-vit", planned_folder(home, train_examples, seed)
    if model.exists() and not force and (before := prepared_before(target, model, progress)):
        return before
    archive = obtain(IMAGES, home / "cache", archives, progress)
    progress(f"reading {IMAGES.content}")
    files = deb_files(archive, tuple(f"{_FOLDER}{part}-{what}" for part in ("train", "t10k") for what in _FILES))
    pixels, numbers = (
        {part: read_idx(files[f"{_FOLDER}{part}-{what}"]) for part in ("train", "t10k")} for what in _FILES
    )
    rng = np.random.default_rng(seed)
    if not model.exists():
        _pretrain(model, pixels["train"], numbers["train"], seed, progress)
    chosen = _choose({name: numbers[_PART[name]] for name in SPLITS}, train_examples, rng)
    labels = {name: numbers[_PART[name]][rows] for name, rows in chosen.items()}
    site_of = dirichlet_partition(labels, _SITES, _ALPHA, rng)
    sites = {
        f"site-{site + 1}": {name: chosen[name][site_of[name] == site] for name in SPLITS} for site in range(_SITES)
    }
    federation = _describe(sites, numbers, train_examples, seed)

    def write(path: Path, rows: np.ndarray) -> None:
        part = _PART[path.name]
        _write_images(path, pixels[part], numbers[part], rows)

    return write_dataset(target, model, federation, sites, chosen, write, progress)


def planned_folder(home: Path, train_examples: int = TRAIN_EXAMPLES, seed: int = 0) -> Path:
    """Where the data lie."""
    return home / "data" / f"vision-dirichlet-{_SITES}sites-a{_ALPHA:g}-n{train_examples}-s{seed}"


def read_idx(content: bytes) -> np.ndarray:
    """The array of bytes in a gzipped file of the IDX format.

    Raises:
        DataError: It is none.
    """
    raw = gzip.decompress(content)
    dimensions = raw[3] if raw[:3] == b"\0\0\x08" else 0
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    if not dimensions or len(raw) != 4 + 4 * dimensions + int(np.prod(shape)):
        raise DataError("a file of images is not of the IDX format", cause="a damaged archive")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _choose(labels: Mapping[str, np.ndarray], train_examples: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of each split, of the classes to adapt to; training and validation rows come from one file, and differ."""
    wanted = [CLASSES.index(name) for name in ADAPTED]
    rows = {name: np.flatnonzero(np.isin(found, wanted)) for name, found in labels.items()}
    test, _ = stratified_take(rows["test"], labels["test"], min(_OTHERS["test"], len(rows["test"])), rng)
    validation, rest = stratified_take(rows["train"], labels["train"], _OTHERS["validation"], rng)
    train, _ = stratified_take(rest, labels["train"], min(train_examples, len(rest)), rng)
    return {"train": train, "validation": validation, "test": test}


def _pretrain(model: Path, pixels: np.ndarray, numbers: np.ndarray, seed: int, progress: Callable[[str], None]) -> None:
    require_training()
    from giva_core.models.small_vit import pretrain_small_vit

    wanted = np.array([CLASSES.index(name) for name in PRETRAINED])
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(numbers, wanted)))[:PRETRAINING_IMAGES]
    classes = np.searchsorted(wanted, numbers[rows])
    progress(f"training a small ViT on {len(rows)} pictures of {', '.join(PRETRAINED)}")
    with new_folder(model) as folder:
        accuracy = pretrain_small_vit(folder, pixels[rows], classes, seed, progress)
    progress(f"it tells those apart with an accuracy of {accuracy:.3f} on pictures held out")


def _describe(
    sites: Mapping[str, Mapping[str, np.ndarray]], numbers: Mapping[str, np.ndarray], train_examples: int, seed: int
) -> dict[str, Any]:
    def describe(name: str, rows: np.ndarray) -> dict[str, Any]:
        counts = Counter(CLASSES[number] for number in numbers[_PART[name]][rows])
        return {"examples": len(rows), "classes": {label: counts[label] for label in ADAPTED}}

    return {
        "schema_version": 1,
        "dataset": "vision",
        "partition": "dirichlet",
        "num_sites": _SITES,
        "alpha": _ALPHA,
        "train_examples": train_examples,
        "seed": seed,
        "labels": list(ADAPTED),
        "pretrained_on": list(PRETRAINED),
        "sites": {
            site: {name: describe(name, rows) for name, rows in splits.items()} for site, splits in sites.items()
        },
        "sources": [asdict(IMAGES)],
    }


def _write_images(folder: Path, pixels: np.ndarray, numbers: np.ndarray, rows: np.ndarray) -> None:
    from PIL import Image

    for row in rows:
        path = folder / CLASSES[numbers[row]] / f"{row:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.fromarray(pixels[row]).save(stream, "PNG")
        path.write_bytes(stream.getvalue())  # the folder as a whole appears or does not
