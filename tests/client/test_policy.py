"""What a deployed site lets a server ask."""

from __future__ import annotations

import pytest

from client.policy import Policy
from giva_core.config import RunConfig
from giva_core.errors import ConfigError, DataError, ProtocolError, public_reason
from giva_core.types import LayerShape, ModelSchema


def config(**flat: object) -> RunConfig:
    return RunConfig().replace(**flat)


def schema(d_out: int, d_in: int, rank: int = 8) -> ModelSchema:
    return ModelSchema((LayerShape("wide", 900, 800), LayerShape("small", d_out, d_in)), (rank, rank), {})


def test_node_config_sets_limits_and_the_rest_stays() -> None:
    node = {
        "site": "a",
        "allow-model-hub": True,
        "allowed-methods": "giva, lora",
        "allow-share-counts": True,
        "max-sketch-share": 1,
        "min_train_examples": 100,
    }
    expected = Policy(("giva", "lora"), allow_share_counts=True, max_sketch_share=1.0, min_train_examples=100)
    assert Policy.from_node_config(node) == expected
    assert Policy.from_node_config({"partition-id": 3, "text-column": "report"}) == Policy()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("allow-share-counts", "true"),
        ("min-eval-examples", 2.5),
        ("min-eval-examples", True),
        ("min-eval-examples", -1),
        ("max-sketch-share", float("nan")),
        ("allowed-methods", 1),
        ("min-eval-example", 50),
        ("allow-counts", False),
    ],
)
def test_a_limit_that_cannot_be_read_is_no_limit_less(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        Policy.from_node_config({key: value})
    assert public_reason(caught.value) == "config: the node's configuration is not valid"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "lora"}, "the site's allowed-methods does not allow the method lora"),
        ({"giva__modules_to_save": '["embeddings"]'}, "the site's allow-modules-to-save does not allow"),
    ],
)
def test_methods_and_modules(settings: dict[str, object], reason: str) -> None:
    run = config(**settings)
    with pytest.raises(ConfigError) as caught:
        Policy().check_run(run)
    assert reason in public_reason(caught.value) and "embeddings" not in public_reason(caught.value)
    Policy().check_run(config())
    Policy(("lora", "giva"), allow_modules_to_save=True).check_run(run)


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
    with pytest.raises(ConfigError) as caught:
        Policy().check_sketches(short, giva)
    assert "max-sketch-share" in public_reason(caught.value) and "small" not in public_reason(caught.value)
    Policy(max_sketch_share=1.0).check_sketches(short, giva)


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


def test_calibration_questions_are_those_of_the_plan() -> None:
    giva = config(giva__power_passes=2).giva
    Policy().check_question("right", 2, giva)
    for stage, asked in (("right", 3), ("range", 2), ("coordinates", 1)):
        with pytest.raises(ProtocolError) as caught:
            Policy().check_question(stage, asked, giva)
        assert public_reason(caught.value) == "protocol: more calibration questions than planned"
