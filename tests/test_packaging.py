"""What is installed, and what travels to the sites in Flower's app bundle."""

from __future__ import annotations

import importlib
import io
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.cli.utils import collect_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import giva_core

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def project_files() -> dict[str, bytes | Path]:
    """The project as Flower sees it, without folders that are no part of it (virtual environments, caches)."""
    files: dict[str, bytes | Path] = {path.name: path for path in ROOT.iterdir() if path.is_file()}
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and not (folder / "pyvenv.cfg").exists():
            files.update({f"{folder.name}/{name}": path for name, path in collect_files(folder).items()})
    return files


def bundle(files: dict[str, bytes | Path]) -> dict[str, bytes]:
    """Content by name of the app bundle."""
    content, _ = build_fab_from_files(files)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_version_has_one_value() -> None:
    assert PROJECT["version"] == giva_core.__version__


@pytest.mark.parametrize(
    "reference", [PROJECT["scripts"]["giva"], *PYPROJECT["tool"]["flwr"]["app"]["components"].values()]
)
def test_entry_point_exists(reference: str) -> None:
    module, _, attribute = reference.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    for text in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        requirement = Requirement(text)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_bundle_holds_the_code_and_nothing_else() -> None:
    names = set(bundle(project_files()))
    sources = chain.from_iterable((ROOT / name).rglob("*.py") for name in ("giva_core", "server", "client"))
    packages = {path.relative_to(ROOT).as_posix() for path in sources}
    assert names == packages | {"pyproject.toml", "README.md", "LICENSE", ".info/CONTENT"}


def test_bundle_leaves_data_out_wherever_it_lies() -> None:
    secret = b'{"text": "private", "label": "a"}\n'
    strays = ["site-a/train.jsonl", "client/train.jsonl", "server/notes.md", "patients.json", "deploy/a.toml", "x.py"]
    content = bundle({**project_files(), **dict.fromkeys(strays, secret)})
    assert not set(strays) & set(content)
    assert secret not in content.values()


def test_bundle_is_small_and_always_the_same() -> None:
    files = project_files()
    first, second = build_fab_from_files(files)[0], build_fab_from_files(files)[0]
    assert first == second
    assert len(first) < 1_000_000
