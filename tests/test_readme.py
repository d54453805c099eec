"""What the README shows has to work as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

from server.cli.main import NOUNS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_library_example_trains_saves_and_loads(toy_model, tmp_path, monkeypatch):
    code, tuner = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    texts = ["a b c d", "x y z", "b c e f", "w y x v u"] * 2
    names = {"path": str(toy_model), "texts": texts, "labels": [0, 1, 0, 1] * 2}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "adapter" / "vectors.safetensors").is_file()
    with torch.no_grad():
        loss = names["model"](**names["batch"]).loss
    assert loss < 0.3
    assert any(name.endswith("lambda_s") for name in names["trained"])
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10

    names["model"] = transformers.AutoModelForSequenceClassification.from_pretrained(toy_model, num_labels=2)
    exec(compile(tuner, "README.md", "exec"), names)
    assert names["model"].peft_config["default"].peft_type == "GIVA"


def test_every_command_that_the_readme_shows_exists():
    shown = set(re.findall(r"^    giva ([a-z]+)", README, re.MULTILINE))
    assert {"run", "round", "metrics", "bases", "adapter", "simulate", "train"} <= shown <= NOUNS.keys()


def test_links_point_to_files():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        page, _, anchor = target.partition("#")
        path = Path(__file__).parents[1] / page
        assert path.is_file(), target
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}, target


def test_every_benchmark_that_a_page_names_exists():
    project = Path(__file__).parents[1]
    pages = [*project.glob("*.md"), *(project / "docs").glob("*.md"), project / "Makefile"]
    named = {name for page in pages for name in re.findall(r"benchmarks/\w+\.py", page.read_text(encoding="utf-8"))}
    assert len(named) >= 6
    assert [name for name in sorted(named) if not (project / name).is_file()] == []
