"""The shape of the project: who may import whom, and one source for every default."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain, groupby
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement

import giva_core
from giva_core.config import RunConfig, describe_options, flatten

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"


def app_config() -> dict[str, object]:
    """`[tool.flwr.app.config]` as Flower flattens it."""
    return flatten(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"])


def render_defaults() -> str:
    """The `[tool.flwr.app.config]` tables that belong into pyproject.toml, with the help texts as comments."""
    flat = RunConfig().to_flat()
    tables = []
    for section, options in groupby(describe_options(), key=lambda option: option[0].rpartition(".")[0]):
        lines = [f"[tool.flwr.app.config{'.' if section else ''}{section}]"]
        for key, _, help_text in options:
            lines += [f"# {help_text}", f"{key.rpartition('.')[2]} = {json.dumps(flat[key], ensure_ascii=False)}"]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def test_import_contracts_hold() -> None:
    # in a process of its own: import-linter sets up logging anew, which switches off every logger there is
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    texts = chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {Requirement(text).name for text in texts}
    own = {"giva_core", "server", "client"}
    graph = grimp.build_graph(*own, include_external_packages=True, cache_dir=None)
    third_party = {name.partition(".")[0] for name in graph.modules} - own - set(sys.stdlib_module_names)
    assert {"numpy", "torch", "flwr"} <= third_party
    undeclared = {name for name in third_party if not declared & set(packages_distributions().get(name, [name]))}
    assert undeclared == set()


def test_every_default_of_the_app_equals_the_library_s() -> None:
    expected = RunConfig().to_flat()
    found = app_config()
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}
    assert RunConfig.from_flat(found) == RunConfig()


def test_app_config_carries_the_help_texts() -> None:
    assert render_defaults() in PYPROJECT.read_text(encoding="utf-8"), (
        "a setting changed: run `python tests/regenerate.py`"
    )


@pytest.mark.parametrize("module", ["giva_core", "giva_core.config", "giva_core.errors", "giva_core.bases"])
def test_import_needs_no_framework(module: str) -> None:
    heavy = "{'torch', 'transformers', 'flwr', 'peft', 'ray'}"
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_door_opens_every_name() -> None:
    for name in giva_core.__all__:
        assert callable(getattr(giva_core, name)), name
    assert set(giva_core.__all__) == set(giva_core._DOOR)
    assert set(giva_core.__all__) <= set(dir(giva_core))


def test_public_door_refuses_other_names() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        giva_core.no_such_name  # noqa: B018
