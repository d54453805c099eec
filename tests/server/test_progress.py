"""Lines for people who watch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from giva_core.config import RunConfig
from giva_core.types import RoundRecord, SiteRecord
from server.progress import describe, format_bytes

SITES = (
    SiteRecord("a", "ok", eval_loss=0.25),
    SiteRecord("b", "refused", "the loss is not finite"),
    SiteRecord("c", "ok"),
)


def test_training_round_says_how_it_went_and_what_it_cost() -> None:
    record = RoundRecord(
        "train",
        2,
        SITES,
        total_examples=70,
        train_loss=0.51234,
        eval_loss=0.25,
        metrics={"accuracy": 0.875, "worst_accuracy": 0.5, "mean_site_macro_f1": 0.1},
        aggregation_error=0.1234,
        bytes_up=2048,
        bytes_down=812,
        seconds=3.21,
    )
    config = RunConfig.from_flat({"rounds.num-rounds": 5})
    assert describe(replace(record, eval_loss=None), config).splitlines() == [
        "round 2/5            2/3 sites, train loss 0.5123, aggregation error 12.3%, up 2 KiB, down 812 B, 3.2 s",
        "  b: refused: the loss is not finite",
    ]
    assert describe(record, config) == (
        "  after round 2/5    1 sites, eval loss 0.2500, accuracy 0.8750, worst accuracy 0.5000"
    )


@pytest.mark.parametrize(
    ("phase", "number", "begin"),
    [
        ("hello", 1, "sites joined  "),
        ("calibrate", 3, "calibration pass 3  "),
        ("bases", 1, "bases agreed  "),
        ("head", 1, "head round 1/4  "),
        ("train", 1, "round 1/5  "),
    ],
)
def test_every_phase_has_its_words(phase: str, number: int, begin: str) -> None:
    line = describe(RoundRecord(phase, number, SITES[:1]), RunConfig.from_flat({"rounds.head-rounds": 4}))
    assert line.startswith(begin) and "1/1 sites" in line and line.endswith("0.0 s")
    assert "loss" not in line and "up" not in line


def test_metrics_follow_the_task() -> None:
    record = RoundRecord(
        "train", 1, (), eval_loss=1.0, metrics={"pearson": 0.5, "accuracy": 0.25, "mean_site_pearson": 0.75}
    )
    line = describe(record, RunConfig.from_flat({"task.kind": "regression"}))
    assert "pearson 0.5000" in line and "mean site pearson 0.7500" in line and "accuracy" not in line


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (85_197, "83.2 KiB"),
        (1024**2, "1 MiB"),
        (1_363_149, "1.3 MiB"),
        (5 * 1024**3, "5 GiB"),
        (5000 * 1024**3, "5000 GiB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
