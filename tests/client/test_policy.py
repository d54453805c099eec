"""What a deployed site lets a server ask."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import pytest

from client.policy import METRICS, Policy, PolicyError
from giva_core.config import TASKS, GivaConfig, RunConfig
from giva_core.errors import DataError, ProtocolError, public_reason
from giva_core.metrics import metric_names
from giva_core.types import LayerShape, ModelSchema


def config(**flat: object) -> RunConfig:
    return RunConfig().replace(**flat)


def schema(d_out: int, d_in: int, rank: int = 8) -> ModelSchema:
    return ModelSchema((LayerShape("wide", 900, 800), LayerShape("small", d_out, d_in)), (rank, rank), {})


def refused(policy: Policy, run: RunConfig) -> str:
    """The public reason, empty where the run is allowed."""
    try:
        policy.check_run(run)
    except PolicyError as error:
        return public_reason(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "reason", "roomier"),
    [
        ({"method": "lora"}, "methods does not allow the method lora", {"methods": ("giva", "lora")}),
        ({"task__kind": "regression"}, "tasks does not allow the task regression", {"tasks": TASKS}),
        (
            {"giva__modules_to_save": '["embeddings"]'},
            "allow-modules-to-save does not allow giva.modules-to-save",
            {"allow_modules_to_save": True},
        ),
        ({"giva__rank": 65}, "max-rank does not allow rank 65", {"max_rank": 65}),
        ({"train__local_epochs": 5.5}, "max-local-epochs does not allow 5.5 local epochs", {"max_local_epochs": 5.5}),
        (
            {"rounds__head_rounds": 1, "train__warm_head_epochs": 6.0},
            "max-local-epochs does not allow 6 epochs in a head round",
            {"max_local_epochs": 6.0},
        ),
        (
            {"rounds__num_rounds": 198, "rounds__head_rounds": 3},
            "max-rounds does not allow 201 rounds",
            {"max_rounds": 201},
        ),
    ],
)
def test_runs_that_a_site_refuses(settings: dict[str, object], reason: str, roomier: dict[str, Any]) -> None:
    strict, run = Policy(tasks=("classification",)), config(**settings)
    assert refused(strict, config()) == ""
    assert refused(strict, run) == f"policy: the site's {reason}" and "embeddings" not in refused(strict, run)
    assert refused(Policy(**{"tasks": ("classification",), **roomier}), run) == ""


def test_a_lora_s_rank_is_its_own() -> None:
    policy = Policy(methods=("lora",), max_rank=16)
    assert refused(policy, config(method="lora", lora__rank=16, giva__rank=64)) == ""
    assert refused(policy, config(method="lora", lora__rank=17)) == "policy: the site's max-rank does not allow rank 17"


def test_the_rank_of_each_method_is_held_against_the_limit_where_it_says_something() -> None:
    policy = Policy(methods=("vera", "randlora", "osora", "full", "fedex-lora"), max_rank=16)
    assert refused(policy, config(method="vera", vera__rank=256, giva__rank=64)) == ""
    assert refused(policy, config(method="randlora", randlora__rank=32)) == ""
    assert refused(policy, config(method="full", giva__rank=64)) == ""
    assert "does not allow rank 17" in refused(policy, config(method="osora", giva__rank=17))
    assert "does not allow rank 17" in refused(policy, config(method="fedex-lora", lora__rank=17))
    assert "does not allow the method rolora" in refused(policy, config(method="rolora"))


@pytest.mark.parametrize(
    ("hours", "opened", "closed"),
    [
        ("20:00-06:00", ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
        ("08:30-17:00", ["08:30", "12:00", "16:59"], ["08:29", "17:00", "00:00"]),
        ("12:00-12:00", ["00:00", "11:59", "12:00"], []),
        ("", ["00:00", "12:00"], []),
    ],
)
def test_hours(hours: str, opened: list[str], closed: list[str]) -> None:
    policy = Policy(hours=hours)
    for clock in opened:
        policy.check_hours(datetime.fromisoformat(f"2026-01-02T{clock}"))
    for clock in closed:
        with pytest.raises(PolicyError) as caught:
            policy.check_hours(datetime.fromisoformat(f"2026-01-02T{clock}"))
        assert public_reason(caught.value) == "policy: the site's hours does not allow work at this time of day"


def test_metrics_that_may_leave() -> None:
    assert Policy(metrics=("mcc",)).released({"accuracy": 0.5, "mcc": 0.1}) == {"mcc": 0.1}
    every = {name for kind in TASKS for name in metric_names(kind)}
    assert every == set(METRICS) and Policy().released(dict.fromkeys(every, 0.0)).keys() == every


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 64),  # 16 columns in each of two passes of one side, half of the smaller dimension
        ({"giva__power_passes": 0}, 32),
        ({"giva__power_passes": 3}, 128),
        ({"giva__init": "secsv"}, 96),
    ],
)
@pytest.mark.parametrize("is_tall", [True, False])
def test_sketches_of_all_passes_stay_under_their_share(settings: dict[str, object], least: int, is_tall: bool) -> None:
    giva = config(giva__oversampling=8, **settings).giva
    enough = schema(700, least) if is_tall else schema(least, 700)
    Policy().check_sketches(enough, giva)
    short = schema(700, least - 1) if is_tall else schema(least - 1, 700)
    with pytest.raises(PolicyError) as caught:
        Policy().check_sketches(short, giva)
    assert "max-sketch-share" in public_reason(caught.value) and "small" not in public_reason(caught.value)
    Policy(max_sketch_share=1.0).check_sketches(short, giva)
    # a gradient of few tokens has their rank: as many columns would span all of it, however large the layer
    Policy().check_sketches(enough, giva, vectors=least)
    with pytest.raises(PolicyError):
        Policy().check_sketches(enough, giva, vectors=least - 1)


def test_no_server_gets_a_regular_expression_or_passes_without_end_by_default() -> None:
    for asked, key in (
        ({"giva__target_modules": "(([a-z.]+)*)*x"}, "allow-target-expressions"),
        ({"giva__power_passes": 5}, "max-sketch-share"),
        ({"train__warm_head_epochs": 50.0, "rounds__head_rounds": 0}, "max-local-epochs"),
    ):
        with pytest.raises(PolicyError) as caught:
            Policy().check_run(config(**asked))
        assert key in public_reason(caught.value)
    Policy(allow_target_expressions=True).check_run(config(giva__target_modules="(([a-z.]+)*)*x"))
    Policy().check_run(config(giva__target_modules=("query", "value")))


@pytest.mark.parametrize(
    ("counts", "key"),
    [
        ((7, 20, 20), "min-train-examples"),
        ((20, 7, 20), "min-calibration-examples"),
        ((20, 20, 7), "min-round-examples"),
    ],
)
def test_too_few_examples(counts: tuple[int, int, int], key: str) -> None:
    with pytest.raises(DataError, match=f"got 7; expected {key} = 8") as caught:
        Policy().check_rows(*counts)
    assert public_reason(caught.value) == f"data: fewer examples than the site's {key}"
    Policy(**{key.replace("-", "_"): 7}).check_rows(*counts)
    Policy().check_rows(8, 8, 8)
    Policy().check_rows(8, None, 8)


def test_without_calibration_a_site_answers_no_question_of_it() -> None:
    random = GivaConfig(bases="random")
    least = math.ceil(8 / Policy().max_sketch_share)
    Policy().check_sketches(schema(least, 4 * least), random)
    with pytest.raises(PolicyError, match="bases as wide as"):
        Policy().check_sketches(schema(least - 1, 4 * least), random)
    with pytest.raises(ProtocolError, match="more calibration questions"):
        Policy().check_calibration("range", 1, random)


def test_calibration_questions_are_those_of_the_plan() -> None:
    giva = config(giva__power_passes=2).giva
    Policy().check_calibration("right", 2, giva)
    for stage, asked in (("right", 3), ("range", 2), ("coordinates", 1)):
        with pytest.raises(ProtocolError) as caught:
            Policy().check_calibration(stage, asked, giva)
        assert public_reason(caught.value) == "protocol: more calibration questions than planned"


def test_rounds_are_counted_whatever_the_run_s_configuration_said() -> None:
    Policy(max_rounds=3).check_rounds(3)
    with pytest.raises(PolicyError) as caught:
        Policy(max_rounds=3).check_rounds(4)
    assert public_reason(caught.value) == "policy: the site's max-rounds does not allow 4 rounds"


def test_an_evaluation_may_generate_so_much() -> None:
    asked = {"task__kind": "causal-lm", "task__generate_examples": 100, "task__beams": 4}
    policy = Policy(max_generated_tokens=4_000)
    assert refused(policy, config(**asked, task__max_new_tokens=10)) == ""
    assert "does not allow up to 4400 generated tokens" in refused(policy, config(**asked, task__max_new_tokens=11))
