"""Who is in the run: the majority's form decides, misfits are told why, and who was lost may come back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message

from giva_core.config import RunConfig
from giva_core.errors import QuorumError
from giva_core.protocol import HELLO, PROTOCOL_VERSION, Hello, Payload
from giva_core.types import LayerShape, ModelSchema
from server import exchange
from server.absence import BackOff
from server.approved import ApprovedSites
from server.exchange import Answer, from_content, to_content
from server.local_grid import LocalGrid
from server.members import Members

CONFIG = RunConfig.from_flat(
    {"rounds.min-sites": 2, "rounds.join-seconds": 0.02, "rounds.hello-seconds": 0.02, "rounds.max-site-examples": 99}
)
SCHEMA = ModelSchema((LayerShape("low", 7, 11),), (3,), {"head.weight": (2, 5), "head.bias": (5, 2)})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.0)


def hello(site: str, **changes: object) -> Hello:
    sound = Hello(site, 40, 9, SCHEMA, "m" * 64, "s" * 64, CONFIG.digest(), "torch 1", "cpu")
    return replace(sound, **changes)  # type: ignore[arg-type]


class Sites(LocalGrid):
    """Nodes that introduce themselves as told: a hello, a payload of any form, an error's reason, or silence (None)."""

    def __init__(self, **answers: Hello | Payload | str | None) -> None:
        self.answers = {int(name.removeprefix("n")): answer for name, answer in answers.items()}
        self.connected = set(self.answers)
        self.asked: list[int] = []
        super().__init__(self._introduce, {node_id: {} for node_id in range(100)}, {})

    def _introduce(self, message: Message, context: Context) -> Message:
        self.asked.append(context.node_id)
        assert message.metadata.message_type == HELLO
        assert from_content(message.content).values == {"config": CONFIG.digest(), "protocol": PROTOCOL_VERSION}
        answer = self.answers[context.node_id]
        if isinstance(answer, str):
            return Message(Error(100, answer), reply_to=message)
        assert answer is not None
        payload = answer.to_payload() if isinstance(answer, Hello) else answer
        return Message(to_content(payload), reply_to=message)

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.connected)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        heard = [m for m in messages if self.answers[m.metadata.dst_node_id] is not None]
        ids = iter(list(super().push_messages(heard)))
        return [next(ids) if m in heard else f"silent-{m.metadata.dst_node_id}" for m in messages]

    def join(self, node_id: int, answer: Hello | Payload | str | None) -> None:
        self.answers[node_id] = answer
        self.connected.add(node_id)


def greeted(grid: Sites) -> tuple[Members, dict[str, tuple[str, str]]]:
    """Members after one greeting, and `(status, reason)` by site."""
    members = Members(grid, CONFIG)
    return members, {record.site: (record.status, record.reason) for record in members.greet()}


def test_sites_that_fit_are_admitted() -> None:
    grid = Sites(n5=hello("b", num_train=3), n4=hello("a", num_eval=0))
    members = Members(grid, CONFIG)
    records = members.greet()
    assert [(r.site, r.status, r.reason, r.num_examples, r.eval_examples) for r in records] == [
        ("a", "ok", "", 40, 0),
        ("b", "ok", "", 3, 9),
    ]
    assert all(record.bytes_up > 0 and record.bytes_down > 0 for record in records)
    assert members.nodes() == {"a": 4, "b": 5}
    assert list(members.nodes()) == ["a", "b"]
    assert members.nodes(lambda member: member.hello.num_eval > 0) == {"b": 5}
    assert members.reference is not None and members.reference.schema == SCHEMA


def test_nobody_is_asked_twice() -> None:
    grid = Sites(n4=hello("a"), n5=hello("b"), n6=hello("c", num_train=0), n7="data: no rows", n8=Payload())
    members, _ = greeted(grid)
    assert sorted(grid.asked) == [4, 5, 6, 7, 8]
    assert set(members.turned_away) == {6, 7, 8}
    assert members.greet() == []
    assert sorted(grid.asked) == [4, 5, 6, 7, 8]


def test_majority_decides_what_the_run_is() -> None:
    other = "f" * 64
    grid = Sites(n1=hello("a", model_digest=other), n2=hello("b"), n3=hello("c"))
    members, found = greeted(grid)
    assert members.nodes() == {"b": 2, "c": 3}
    assert found["a"] == ("refused", "its base model ffffffffffff… is not the others' mmmmmmmmmmmm…")


def test_first_name_decides_among_equals() -> None:
    grid = Sites(n1=hello("b"), n2=hello("a", state_digest="f" * 64))
    members, found = greeted(grid)
    assert members.nodes() == {"a": 2}
    assert found["b"] == ("refused", "its starting head ssssssssssss… is not the others' ffffffffffff…")


def test_sites_of_another_run_do_not_vote() -> None:
    stranger = {"config_digest": "0" * 64, "model_digest": "f" * 64}
    grid = Sites(n1=hello("a", **stranger), n2=hello("b", **stranger), n3=hello("c"))
    members, found = greeted(grid)
    assert members.nodes() == {"c": 3}
    assert found["a"][0] == "refused" and "its run configuration 000000000000…" in found["a"][1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config_digest": "0" * 64}, "its run configuration 000000000000… is not the run's"),
        ({"num_train": 0}, "it has no training examples"),
        ({"num_train": 100}, "more examples than rounds.max-site-examples = 99"),
        ({"num_train": 2**63 - 1}, "more examples than rounds.max-site-examples = 99"),
        ({"num_eval": 100}, "more examples than rounds.max-site-examples = 99"),
        ({"num_eval": -1}, "or fewer than none"),
        ({"model_digest": "0" * 64}, "its base model 000000000000…"),
        ({"state_digest": "0" * 64}, "its starting head 000000000000…"),
        ({"frozen_digest": "0" * 64}, "its frozen part 000000000000…"),
        ({"schema": replace(SCHEMA, ranks=(2,))}, "trains other layers or shapes"),
        (
            {"schema": replace(SCHEMA, state=dict(reversed(list(SCHEMA.state.items()))))},
            "trains other layers or shapes",
        ),
    ],
)
def test_each_misfit_is_told_why(changes: dict[str, object], reason: str) -> None:
    members, found = greeted(Sites(n1=hello("a"), n2=hello("b"), n3=hello("c", **changes)))
    assert members.nodes() == {"a": 1, "b": 2}
    assert found["c"][0] == "refused" and reason in found["c"][1]
    assert members.turned_away == {3: found["c"][1]}


def test_a_key_approved_for_one_name_does_not_speak_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIVA_HOME", str(tmp_path))
    for node_id, site in (("1", "a"), ("2", "b")):
        ApprovedSites().add(node_id, site, "SHA256:x")
    members, found = greeted(Sites(n1=hello("a"), n2=hello("c"), n3=hello("d")))
    assert members.nodes() == {"a": 1, "d": 3}
    assert found["c"] == ("refused", "it calls itself c, but its key was approved as b")


def test_answers_that_are_no_hello() -> None:
    other_version = hello("e").to_payload()
    other_version.values["protocol"] = PROTOCOL_VERSION + 1
    members, found = greeted(Sites(n1=hello("a"), n2="data: no rows", n3=Payload(), n4=other_version, n5=None))
    assert members.nodes() == {"a": 1}
    assert found["node-2"] == ("failed", "data: no rows")
    assert found["node-3"][0] == "failed" and "lacks 'protocol'" in found["node-3"][1]
    assert found["node-4"][0] == "failed" and "another protocol version" in found["node-4"][1]
    assert found["node-5"] == ("missing", "no answer within 0.02 s")


def test_silent_node_is_asked_again_after_ever_longer_pauses() -> None:
    now = [1000.0]
    grid = Sites(n1=hello("a"), n2=None)
    members = Members(grid, CONFIG, back_off=BackOff(lambda: now[0]))
    assert [record.status for record in members.greet()] == ["ok", "missing"]
    assert members.turned_away == {}
    for pause in (60.0, 120.0):
        now[0] += pause - 1
        assert members.greet() == []
        now[0] += 1
        assert [(record.site, record.status) for record in members.greet()] == [("node-2", "missing")]
    grid.answers[2] = hello("b")
    now[0] += 240.0
    assert [record.site for record in members.greet()] == ["b"]
    assert members.nodes() == {"a": 1, "b": 2}


def test_what_a_site_claims_that_is_turned_away_is_not_recorded() -> None:
    members = Members(Sites(n1=hello("a"), n2=hello("b", num_train=2**63 - 1)), CONFIG)
    assert [(record.site, record.num_examples) for record in members.greet()] == [("a", 40), ("b", 0)]


def test_two_refused_nodes_of_one_name_have_two_records() -> None:
    _, found = greeted(Sites(n1=hello("a"), n2=hello("b"), n3=hello("x", num_train=0), n4=hello("x", num_train=0)))
    assert set(found) == {"a", "b", "x", "x-4"}
    _, found = greeted(Sites(n1=hello("a"), n2=hello("a"), n3=hello("a-2")))
    assert {site: status for site, (status, _) in found.items()} == {"a": "ok", "a-2": "ok", "a-2-2": "refused"}


def test_a_site_may_not_be_called_like_an_unnamed_node() -> None:
    members, found = greeted(Sites(n1=hello("a"), n2=hello("node-3"), n3="data: no rows"))
    assert members.nodes() == {"a": 1}
    assert "its name begins with 'node-'" in found["node-3"][1]
    assert set(found) == {"a", "node-3", "node-3-3"}


def test_nobody_answers() -> None:
    members, found = greeted(Sites(n1=None, n2="data"))
    assert members.reference is None and members.nodes() == {}
    assert [status for status, _ in found.values()] == ["missing", "failed"]


def test_name_is_taken_once() -> None:
    grid = Sites(n1=hello("a"), n2=hello("a"))
    members, found = greeted(grid)
    assert members.nodes() == {"a": 1}
    assert found == {"a": ("ok", ""), "a-2": ("refused", "another connected node already is site a")}


def test_site_comes_back_as_another_node() -> None:
    grid = Sites(n1=hello("a"), n2=hello("b"))
    members, _ = greeted(grid)
    grid.connected.remove(1)
    grid.join(9, hello("a", num_train=41))
    assert [(record.site, record.num_examples) for record in members.greet()] == [("a", 41)]
    assert members.nodes() == {"a": 9, "b": 2}


def test_site_comes_back_before_its_old_node_is_known_to_be_gone() -> None:
    grid = Sites(n1=hello("a"), n2=hello("b"))
    members, _ = greeted(grid)
    grid.join(9, hello("a"))
    assert [record.status for record in members.greet()] == ["refused"]
    assert members.nodes() == {"a": 1, "b": 2}
    grid.connected.remove(1)
    members.greet()
    assert members.nodes() == {"a": 9, "b": 2}


def test_site_that_comes_back_changed_is_refused() -> None:
    grid = Sites(n1=hello("a"), n2=hello("b"))
    members, _ = greeted(grid)
    grid.connected.remove(1)
    grid.join(9, hello("a", model_digest="f" * 64))
    assert [record.status for record in members.greet()] == ["refused"]
    assert members.nodes() == {"b": 2}


def test_lost_node_leaves() -> None:
    grid = Sites(n1=hello("a"), n2=hello("b"))
    members, _ = greeted(grid)
    grid.connected.remove(1)
    assert members.greet() == [] and members.nodes() == {"b": 2}


def test_dropped_for_good_and_forgotten_for_now() -> None:
    grid = Sites(n1=hello("a"), n2=hello("b"))
    members, _ = greeted(grid)
    members.drop("a", "other bases")
    members.forget("b")
    members.forget("b")
    assert members.nodes() == {} and members.turned_away == {1: "other bases"}
    assert [record.site for record in members.greet()] == ["b"]
    assert members.nodes() == {"b": 2}


def test_benched_sites_are_spared_unless_too_few_are_left() -> None:
    members, _ = greeted(Sites(n1=hello("a"), n2=hello("b"), n3=hello("c", num_eval=0)))
    silent = Answer("a", 1, None, "missing")
    members.bench.note([silent, silent])
    assert members.active(2) == {"b": 2, "c": 3}
    assert members.active(3) == members.nodes() == {"a": 1, "b": 2, "c": 3}
    assert members.active(0, lambda member: member.hello.num_eval > 0) == {"b": 2}


def test_wait_is_over_once_enough_are_connected() -> None:
    grid = Sites(n1=hello("a"), n2=None)
    Members(grid, CONFIG).wait()
    assert grid.asked == []


def test_wait_says_what_it_waited_for() -> None:
    with pytest.raises(QuorumError, match=r"got 1 after 0\.02 s; expected rounds\.min-sites = 2.*not started"):
        Members(Sites(n1=hello("a")), CONFIG).wait()


def test_nodes_that_were_turned_away_do_not_count_as_connected() -> None:
    members, _ = greeted(Sites(n1=hello("a"), n2=hello("b", num_train=0)))
    with pytest.raises(QuorumError, match=r"got 1 after.*turned away: it has no training examples"):
        members.wait()
