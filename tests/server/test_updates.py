"""What counts in a round, as its answers come and over several attempts."""

from __future__ import annotations

import numpy as np
import pytest

from giva_core import protocol
from giva_core.protocol import Hello
from giva_core.types import ClientUpdate, ModelSchema, SiteRecord
from server.exchange import Answer
from server.updates import Intake, merge_attempts


def test_only_the_counted_attempt_counts() -> None:
    earlier = [
        SiteRecord("a", "ok", num_examples=40, num_steps=5, train_loss=0.5, bytes_up=10, bytes_down=3),
        SiteRecord("b", "ok", num_examples=30, num_steps=4, train_loss=0.4, bytes_up=11, bytes_down=3),
        SiteRecord("c", "missing", "no answer within 5 s", bytes_down=3),
        SiteRecord("d", "ok", num_examples=20, bytes_up=12, bytes_down=3),
    ]
    later = [
        SiteRecord("a", "ok", num_examples=40, num_steps=6, train_loss=0.6, bytes_up=10, bytes_down=3),
        SiteRecord("d", "refused", "not finite", bytes_up=12, bytes_down=3),
    ]
    assert merge_attempts(earlier, later) == [
        SiteRecord("a", "ok", num_examples=40, num_steps=6, train_loss=0.6, bytes_up=20, bytes_down=6),
        SiteRecord("b", "failed", "attempt without quorum", bytes_up=11, bytes_down=3),
        SiteRecord("c", "missing", "no answer within 5 s", bytes_down=3),
        SiteRecord("d", "refused", "not finite", bytes_up=24, bytes_down=6),
    ]


def test_a_single_attempt_is_what_it_is() -> None:
    records = [SiteRecord("b", "ok", num_examples=3), SiteRecord("a", "failed", "data")]
    assert merge_attempts([], records) == [records[1], records[0]]


SHAPES = {"w": (2, 3), "b": (2,)}


def answer(site: str, value: float, examples: int = 5) -> Answer:
    arrays = {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}
    update = ClientUpdate(arrays, examples, 3, 0.5, "")
    return Answer(site, 1, protocol.update_to_payload(update, list(SHAPES)), "ok", bytes_up=99)


def hello(site: str, examples: int = 5) -> Hello:
    return Hello(site, examples, 0, ModelSchema((), (), SHAPES), "", "", "", "", "cpu")


@pytest.mark.parametrize("keeps", [True, False])
def test_answers_are_checked_as_they_come_and_their_updates_let_go(keeps: bool) -> None:
    start = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    hellos = {"a": hello("a"), "b": hello("b", 15), "c": hello("c"), "d": hello("d")}
    intake = Intake(hellos, start, list(SHAPES), keeps=keeps)
    came = [answer("b", 4.0, 15), answer("a", 8.0), answer("c", np.nan), Answer("d", 4, None, "missing", "no answer")]
    slim = [intake.take(each) for each in came]
    assert all(each.payload is None or not each.payload.arrays for each in slim)
    accepted = intake.accepted(sorted(slim, key=lambda each: each.site))
    assert [(record.site, record.status) for record in accepted.records] == [
        ("a", "ok"), ("b", "ok"), ("c", "refused"), ("d", "missing"),
    ]  # fmt: skip
    assert accepted.records[0].bytes_up == 99 and accepted.records[0].num_steps == 3
    assert "not finite" in accepted.records[2].reason
    assert [update.num_examples for update in accepted.updates] == [5, 15]
    assert all(bool(update.arrays) == keeps for update in accepted.updates)
    if keeps:
        assert accepted.mean is None
    else:
        assert accepted.mean is not None and np.all(accepted.mean["w"] == 5.0)


def test_nothing_that_counts_has_no_mean() -> None:
    intake = Intake({"a": hello("a")}, {"w": np.zeros((2, 3), np.float32)}, ["w"], keeps=False)
    assert intake.accepted([intake.take(Answer("a", 1, None, "failed", "internal"))]).mean is None
