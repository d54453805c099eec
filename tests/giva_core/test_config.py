"""Settings: one parser for every source, its limits, and the digest that proves that two sides agree."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from giva_core.config import (
    GivaConfig,
    RunConfig,
    Section,
    describe_options,
    flatten,
    option_types,
    parse_assignments,
)
from giva_core.errors import ConfigError
from giva_core.paths import expand, giva_home

OTHER: dict[str, Any] = {
    "name": "trial",
    "model.path": "org/model",
    "task.labels": ("ja", "nein", "weiß nicht"),
    "giva.rank": 5,
    "giva.target-modules": ("query", "value"),
    "giva.modules-to-save": ("norm",),
    "train.learning-rate": 0.25,
    "train.schedule": "cosine",
    "rounds.quorum": 2,
    "rounds.min-sites": 3,
    "strategy.name": "fedadam",
    "strategy.options": '{"eta": 0.1}',
    "task.share-counts": True,
}


def sections() -> list[tuple[str, type[Section]]]:
    """Prefix and class of every section, the top one included."""
    inner = [(f"{spec.name}.", type(getattr(RunConfig(), spec.name))) for spec in dataclasses.fields(RunConfig)]
    return [("", RunConfig), *((prefix, kind) for prefix, kind in inner if issubclass(kind, Section))]


def limited_options(limit: str) -> list[tuple[str, Any]]:
    """`(key, bound)` of every setting that has this limit."""
    return [
        (prefix + spec.name.replace("_", "-"), spec.metadata[limit])
        for prefix, kind in sections()
        for spec in dataclasses.fields(kind)  # type: ignore[arg-type]
        if spec.metadata.get(limit) not in (None, ())
    ]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RunConfig(), RunConfig.from_flat(OTHER)], ids=["defaults", "other"])
def test_flat_and_json_come_back(config: RunConfig) -> None:
    assert RunConfig.from_flat(config.to_flat()) == config
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig.from_nested(nested(config.to_flat())) == config


def test_flat_form_is_scalar_and_keeps_letters() -> None:
    flat = RunConfig.from_flat(OTHER).to_flat()
    assert {type(value) for value in flat.values()} <= {str, int, float, bool}
    assert flat["task.labels"] == '["ja", "nein", "weiß nicht"]'
    assert flat["giva.target-modules"] == '["query", "value"]'
    assert RunConfig().to_flat()["giva.target-modules"] == "all-linear"


def test_toml_comes_back_and_overrides_come_first(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'name = "trial"\n[giva]\nrank = 5\ntarget-modules = ["query", "value"]\n'
        '[train]\nlearning-rate = 1\n[strategy]\nname = "fedadam"\noptions = { eta = 0.5 }\n',
        encoding="utf-8",
    )
    config = RunConfig.from_toml(file, {"giva.rank": 6})
    assert (config.name, config.giva.rank, config.giva.target_modules) == ("trial", 6, ("query", "value"))
    assert config.train.learning_rate == 1.0 and isinstance(config.train.learning_rate, float)
    assert config.strategy.parsed_options() == {"eta": 0.5}
    assert RunConfig.from_toml(file).giva.rank == 5


def test_toml_folders_count_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sites").mkdir()
    file = tmp_path / "run.toml"

    def read(folder: str, model: str = "") -> tuple[str, str]:
        file.write_text(f'[data]\nfolder = "{folder}"\n[model]\npath = "{model}"\n', encoding="utf-8")
        config = RunConfig.from_toml(file)
        return config.data.folder, config.model.path

    monkeypatch.setenv("GIVA_HOME", str(tmp_path / "home"))
    assert read("sites", "org/model") == (str(tmp_path / "sites"), "org/model")
    assert read("./not-yet") == (str(tmp_path / "not-yet"), "")
    assert read("../beside") == (str(tmp_path.parent / "beside"), "")
    assert read("$GIVA_HOME/data", "${GIVA_HOME}/model") == (str(tmp_path / "home/data"), str(tmp_path / "home/model"))
    assert read("/absolute") == ("/absolute", "")


def test_giva_home_is_one_folder_and_its_name_a_whole_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVA_HOME", str(tmp_path))
    assert giva_home() == expand("$GIVA_HOME") == expand("${GIVA_HOME}") == tmp_path
    assert expand("$GIVA_HOME/a/b") == tmp_path / "a" / "b"
    assert expand("$GIVA_HOMES/a") == Path("$GIVA_HOMES/a")
    monkeypatch.setenv("GIVA_HOME", "")
    assert giva_home() == Path.home() / ".giva"
    assert expand("~/a") == Path.home() / "a"


def test_toml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        RunConfig.from_toml(tmp_path / "none.toml")
    file = tmp_path / "run.toml"
    file.write_text("giva = [", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML"):
        RunConfig.from_toml(file)
    file.write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        RunConfig.from_toml(file)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("giva.rnak", "giva.rank"), ("train.learning_rate", "train.learning-rate"), ("rounds.quorums", "rounds.quorum")],
)
def test_unknown_key_suggests_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"no setting '{key}'.*'{nearest}'"):
        RunConfig.from_flat({key: 1})


def test_key_like_no_other_names_them_all() -> None:
    with pytest.raises(ConfigError, match=r"one of .*data\.folder.*train\.weight-decay"):
        RunConfig.from_flat({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("giva.rank", "8"),
        ("giva.rank", 8.5),
        ("giva.rank", True),
        ("train.learning-rate", "fast"),
        ("train.learning-rate", True),
        ("name", 7),
        ("task.share-counts", 1),
        ("task.share-counts", "yes"),
        ("giva.target-modules", 7),
    ],
)
def test_wrong_type_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} has the wrong type"):
        RunConfig.from_flat({key: value})


@pytest.mark.parametrize("value", ["query", '{"a": 1}', "[1, 2]", [1, 2], "[broken"])
def test_lists_are_lists_of_names(value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"task\.labels is not a list of names; got {re.escape(repr(value))}"):
        RunConfig.from_flat({"task.labels": value})


def test_values_that_mean_the_same_are_accepted() -> None:
    config = RunConfig.from_flat(
        {"giva.rank": 4.0, "train.learning-rate": 1, "task.share-counts": "True", "task.labels": ""}
    )
    assert (config.giva.rank, config.train.learning_rate) == (4, 1.0)
    assert config.task.share_counts is True and config.task.labels == ()


def test_limits_exist_to_be_tested() -> None:
    assert min(len(limited_options(limit)) for limit in ("choices", "minimum", "maximum", "above")) > 0


def typed(key: str, value: float) -> float | int:
    return value if option_types()[key] is float else int(value)


@pytest.mark.parametrize(("key", "bound"), limited_options("minimum"))
def test_below_the_minimum(key: str, bound: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} is too small; got .*expected at least"):
        RunConfig.from_flat({key: typed(key, bound - 1)})


@pytest.mark.parametrize(("key", "bound"), limited_options("maximum"))
def test_above_the_maximum(key: str, bound: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} is too large; got .*expected at most"):
        RunConfig.from_flat({key: typed(key, bound + 1)})


@pytest.mark.parametrize(("key", "bound"), limited_options("above"))
def test_not_above_an_open_bound(key: str, bound: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} is too small; got .*expected more than"):
        RunConfig.from_flat({key: typed(key, bound)})


@pytest.mark.parametrize(("key", "choices"), limited_options("choices"))
def test_only_the_choices(key: str, choices: tuple[Any, ...]) -> None:
    other = 7 if isinstance(choices[0], int) else "another"
    with pytest.raises(ConfigError, match=f"{key} is not a known choice.*{choices[-1]}"):
        RunConfig.from_flat({key: other})


@pytest.mark.parametrize("key", [key for key, hint in option_types().items() if hint is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} is not a finite number"):
        RunConfig.from_flat({key: value})


@pytest.mark.parametrize(
    ("flat", "match"),
    [
        ({"method": "lora", "rounds.mode": "exact"}, "averages GiVA's vectors"),
        ({"method": "head", "rounds.mode": "alternate"}, "averages GiVA's vectors"),
        ({"rounds.mode": "exact", "strategy.name": "fedmedian"}, "keeps the exact mean"),
        ({"giva.bases": "random", "giva.init": "topsv"}, "giva.init = topsv makes B of the gradient"),
        ({"giva.bases": "random", "method": "lora-xs", "lora_xs.bases": "gradient"}, "takes singular vectors"),
        ({"rounds.quorum": 3, "rounds.min-sites": 2}, "never reach its quorum"),
        ({"rounds.min-sites": 1}, "quorum 2, min-sites 1.*set both to 1"),
        ({"task.labels": ["a", "b", "a"]}, "names a label twice"),
        ({"strategy.name": "fedadam", "strategy.options": "eta=1"}, "not a JSON object"),
        ({"strategy.name": "fedadam", "strategy.options": "[1]"}, "not a JSON object"),
    ],
)
def test_settings_that_do_not_fit_together(flat: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RunConfig.from_flat(flat)


@pytest.mark.parametrize(
    "flat",
    [
        {"rounds.mode": "exact", "strategy.name": "fedprox"},
        {"rounds.quorum": 1, "rounds.min-sites": 1},
        {"rounds.quorum": 2, "rounds.min-sites": 2, "rounds.fraction-train": 0.5},
    ],
)
def test_settings_that_do_fit_together(flat: dict[str, Any]) -> None:
    assert RunConfig.from_flat(flat).to_flat().items() >= flat.items()


# -- digest and copies ------------------------------------------------------------------------------------------------

LOCAL = {
    "name": "n",
    "resume": "r",
    "model.path": "/m",
    "model.local-files-only": False,
    "train.device": "cuda:1",
    "data.folder": "/d",
} | {key: "other.csv" for key in option_types() if key.startswith("data.")}


@pytest.mark.parametrize("key", LOCAL)
def test_digest_leaves_out_each_side_s_own_affairs(key: str) -> None:
    assert RunConfig.from_flat({key: LOCAL[key]}).digest() == RunConfig().digest()


def another_value(key: str) -> Any:
    """A value other than the default."""
    old = RunConfig().to_flat()[key]
    if choices := dict(limited_options("choices")).get(key):
        return next(choice for choice in choices if choice != old)
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return old + 1
    if isinstance(old, float):
        return old / 2 or 0.5
    special = {"strategy.options": '{"eta": 1}', "task.prompt-template": "Q: {prompt}"}
    return special.get(key, '["other"]')


@pytest.mark.parametrize("key", sorted(set(option_types()) - set(LOCAL) - {"giva.dtype"}))  # which has but one value
def test_digest_changes_with_everything_else(key: str) -> None:
    base = {"rounds.min-sites": 3} if key == "rounds.quorum" else {}  # a quorum needs its sites
    assert RunConfig.from_flat({**base, key: another_value(key)}).digest() != RunConfig.from_flat(base).digest()


def test_a_section_comes_back_from_its_json() -> None:
    section = RunConfig.from_flat(OTHER).giva
    assert type(section).from_json(section.to_json()) == section
    with pytest.raises(ConfigError, match=r"there is no setting 'giva.ranks'; expected 'giva.rank'"):
        type(section).from_json('{"ranks": 3}')


def test_a_setting_without_its_section_is_found() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'learning-rate'; expected 'train.learning-rate'\."):
        RunConfig.from_flat({"learning-rate": 0.1})
    with pytest.raises(ConfigError, match=r"expected 'giva.rank' or 'lora.rank' or"):
        RunConfig.from_flat({"rank": 4})


def test_replace_changes_what_is_named_and_checks_it() -> None:
    config = RunConfig.from_flat(OTHER)
    changed = config.replace(giva__rank=7, train__learning_rate=0.5, name="again")
    assert (changed.giva.rank, changed.train.learning_rate, changed.name) == (7, 0.5, "again")
    assert changed.replace(giva__rank=5, train__learning_rate=0.25, name="trial") == config
    with pytest.raises(ConfigError, match=r"giva\.rank is too small"):
        config.replace(giva__rank=0)


def test_configs_are_frozen_and_checked_when_made() -> None:
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.giva.rank = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"giva\.rank is too small"):
        dataclasses.replace(config.giva, rank=0)


def test_sketch_width() -> None:
    giva = RunConfig.from_flat({"giva.oversampling": 3}).giva
    assert giva.sketch_width(4, 100) == 7
    assert giva.sketch_width(4, 5) == 5
    assert dataclasses.replace(giva, init="secsv").sketch_width(4, 100) == 11


# -- help and assignments ---------------------------------------------------------------------------------------------


def test_help_covers_every_key_with_its_default() -> None:
    rows = describe_options()
    assert [key for key, _, _ in rows] == list(RunConfig().to_flat())
    assert {key for key, _, _ in rows} == set(option_types())
    assert {key: default for key, default, _ in rows} == {key: str(v) for key, v in RunConfig().to_flat().items()}
    assert all(text for _, _, text in rows)
    assert "(giva, lora, ffa-lora," in {key: text for key, _, text in rows}["method"]


def test_assignments_are_toml_values_or_words() -> None:
    flat = parse_assignments(
        [
            "giva.rank=8",
            "task.head=mean",
            "train.learning-rate=1e-2",
            'task.labels=["a", "b"]',
            "task.share-counts=true",
        ]
    )
    assert flat == {
        "giva.rank": 8,
        "task.head": "mean",
        "train.learning-rate": 0.01,
        "task.labels": ["a", "b"],
        "task.share-counts": True,
    }
    assert RunConfig.from_flat(flat).task.labels == ("a", "b")


@pytest.mark.parametrize("text", ["20260101", "2026-01-01", "12e4567", "true", "1.5", "007"])
def test_assigned_names_stay_text_whatever_they_look_like(text: str) -> None:
    assert RunConfig.from_flat(parse_assignments([f"resume={text}"])).resume == text


def test_assigned_values_may_have_equals_signs_and_quotes() -> None:
    assert parse_assignments(["name=a=b", 'data.folder="x y"', 'strategy.options={"eta": 1}']) == {
        "name": "a=b",
        "data.folder": "x y",
        "strategy.options": '{"eta": 1}',
    }


def test_assignment_without_a_value() -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_assignments(["giva.rank"])


def test_flatten_keeps_strategy_options_together() -> None:
    flat = flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}, "strategy": {"options": {"y": 1, "x": 2}}})
    assert flat == {"a": 1, "b.c": 2, "b.d.e": 3, "strategy.options": '{"x": 2, "y": 1}'}
    assert json.loads(str(flat["strategy.options"])) == {"x": 2, "y": 1}


def test_a_section_goes_through_json_by_itself():
    config = GivaConfig(rank=5, target_modules=("query", "value"), init="secsv", dropout=0.25)
    assert GivaConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"giva\.rank is too small"):
        GivaConfig.from_json('{"rank": 0}')
    with pytest.raises(ConfigError, match="there is no setting"):
        GivaConfig.from_json('{"colour": 1}')
