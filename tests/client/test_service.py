"""One question in, one answer out: what is asked of a site, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import service
from client.policy import Policy
from client.questions import Questions
from client.site import SiteSettings
from giva_core import protocol
from giva_core.config import RunConfig
from giva_core.errors import GivaError, ProtocolError, public_reason
from giva_core.protocol import Hello, Payload


class Site:
    """Just enough of a trainer."""

    def __init__(self, config: RunConfig, policy: Policy | None) -> None:
        self.config, self.policy = config, policy


@pytest.fixture
def site(toy_config: RunConfig, toy_folder: Path) -> SiteSettings:
    return SiteSettings("site-1", toy_folder / "site-1", toy_config.data, "cpu", Policy())


@pytest.fixture
def untrained(site: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.trainer.get_trainer", lambda site, config: Site(config, site.policy))
    for kind in (protocol.CALIBRATE, protocol.HEAD, protocol.ROUND, protocol.EVALUATE):
        monkeypatch.setitem(service._HANDLERS, kind, lambda request, own: Payload())


def test_a_site_introduces_itself(site: SiteSettings, toy_config: RunConfig) -> None:
    config = toy_config.replace(giva__rank=2, giva__oversampling=2)
    question = Payload(values={"config": config.digest(), "protocol": protocol.PROTOCOL_VERSION})
    hello = Hello.from_payload(service.answer(protocol.HELLO, question, site, config))
    assert (hello.site, hello.num_train) == ("site-1", 24)
    state = service.answer(protocol.STATE, Payload(), site, config)
    assert state.array("state").shape == (2 * 16 + 2,)
    assert service.answer(protocol.FINISH, Payload(), site, config) == Payload()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        (
            "query.hello",
            {"protocol": 99},
            f"protocol: the server speaks protocol 99, this site {protocol.PROTOCOL_VERSION}",
        ),
        ("query.hello", {}, "protocol: message lacks protocol"),
        ("train.everything", {}, "protocol: unknown kind of message"),
        ("train.calibrate", {"stage": "sideways"}, "protocol: unknown calibration pass"),
        ("train.calibrate", {}, "protocol: message lacks stage"),
    ],
)
def test_questions_that_are_none(
    site: SiteSettings, toy_config: RunConfig, tmp_path: Path, kind: str, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ProtocolError) as caught:
        service.answer(kind, Payload(values=values), site, toy_config, questions=Questions(tmp_path, "1"))
    assert public_reason(caught.value) == reason


def asked(site: SiteSettings, config: RunConfig, questions: Questions, kind: str, **values: Any) -> str:
    """The reason of the refusal; empty for an answer."""
    payload = Payload({"codes": np.array([values.pop("code", 0)], np.int16)}, values)
    try:
        service.answer(kind, payload, site, config, questions=questions)
    except GivaError as error:
        return public_reason(error)
    return ""


@pytest.mark.usefixtures("untrained")
def test_a_run_s_calibration_questions_are_counted(site: SiteSettings, toy_config: RunConfig, tmp_path: Path) -> None:
    def calibrate(stage: str, code: int, run: str = "1") -> str:
        return asked(site, toy_config, Questions(tmp_path, run), "train.calibrate", stage=stage, code=code)

    refused = "protocol: more calibration questions than planned"
    assert [calibrate(stage, 1) for stage in ("range", "left", "right")] == ["", "", ""]
    assert calibrate("right", 1) == ""  # the same question has the same answer
    assert calibrate("right", 2) == calibrate("coordinates", 1) == refused
    assert calibrate("right", 1) == ""
    assert calibrate("right", 2, run="2") == ""


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("changes", [{"method": "lora"}, {"method": "head"}, {"giva__bases": "random"}])
def test_a_run_without_calibration_has_no_question_of_it(
    site: SiteSettings, toy_config: RunConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = asked(site, toy_config.replace(**changes), Questions(tmp_path, "1"), "train.calibrate", stage="range")
    assert found == "protocol: this run has no calibration"


@pytest.mark.usefixtures("untrained")
def test_rounds_are_counted_but_not_those_tried_again(
    site: SiteSettings, toy_config: RunConfig, tmp_path: Path
) -> None:
    strict = SiteSettings("a", site.folder, site.data, "cpu", Policy(max_rounds=3))

    def train(kind: str, number: int, code: int = 0) -> str:
        return asked(strict, toy_config, Questions(tmp_path, "1"), kind, **{"server-round": number}, code=code)

    refused = "policy: the site's max-rounds does not allow 4 rounds"
    assert train("train.head", 1) == train("train.round", 1) == train("train.round", 1, code=5) == ""
    assert train("train.round", 1) == ""  # no quorum: tried again
    assert train("train.round", 2) == train("train.head", 1, code=7) == refused


@pytest.mark.usefixtures("untrained")
def test_evaluations_are_counted_too(site: SiteSettings, toy_config: RunConfig, tmp_path: Path) -> None:
    strict = SiteSettings("a", site.folder, site.data, "cpu", Policy(max_rounds=2))
    found = [asked(strict, toy_config, Questions(tmp_path, "1"), "evaluate.round", code=code) for code in (1, 2, 2, 3)]
    assert found == ["", "", "", "policy: the site's max-rounds does not allow 3 evaluations"]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("changes", [{"giva__seed": 5}, {"giva__calibration_batch_size": 9}, {"train__clip_norm": 2.0}])
def test_a_run_keeps_the_configuration_of_its_first_question(
    site: SiteSettings, toy_config: RunConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = toy_config.replace(**changes)
    refused = "protocol: the run's configuration has changed"
    assert asked(site, toy_config, Questions(tmp_path, "1"), "train.calibrate", stage="left") == ""
    for kind, values in (("train.calibrate", {"stage": "range"}), ("train.round", {}), ("evaluate.round", {})):
        assert asked(site, other, Questions(tmp_path, "1"), kind, **values) == refused
        assert asked(site, toy_config, Questions(tmp_path, "1"), kind, **values) == ""


@pytest.mark.usefixtures("untrained")
def test_a_simulated_site_counts_nothing(site: SiteSettings, toy_config: RunConfig, tmp_path: Path) -> None:
    own = SiteSettings("a", site.folder, site.data, "cpu")
    assert [
        asked(own, toy_config, Questions(tmp_path, "1"), "train.calibrate", stage="right", code=number)
        for number in range(4)
    ] == [""] * 4
    assert not list(tmp_path.iterdir())
