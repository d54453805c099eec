"""The wrapper of the command `flwr`: what it is asked, and what its answers and failures become."""

from __future__ import annotations

import json
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from giva_core.config import RunConfig, flatten
from giva_core.errors import ConfigError, DependencyError
from server import flower
from server.connections import Connection, SuperLinkError
from server.flower import Node, SuperLink, app_folder

FAKE = """#!{python}
import json, os, sys
answer = json.load(open({answers!r}))
call = {{"arguments": sys.argv[1:], "environment": dict(os.environ)}}
for argument in sys.argv:
    if argument.endswith("run.toml"):
        call["run"] = open(argument, encoding="utf-8").read()
open({calls!r}, "a").write(json.dumps(call) + "\\n")
sys.stderr.write(answer.get("stderr", ""))
sys.stdout.write(answer["stdout"])
sys.exit(answer.get("code", 0))
"""
PUBLIC_KEY = "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQ= hospital-a\n"


class FakeFlwr:
    """A command `flwr` that answers as it is told and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.command, self._answers, self._calls = folder / "flwr", folder / "answer.json", folder / "calls"
        text = FAKE.format(python=sys.executable, answers=str(self._answers), calls=str(self._calls))
        self.command.write_text(text)
        self.command.chmod(0o755)

    def answers(self, stdout: object, **extra: object) -> None:
        text = stdout if isinstance(stdout, str) else json.dumps(stdout, indent=2)
        self._answers.write_text(json.dumps({"stdout": text, **extra}))

    def fails(self, message: str) -> None:
        self.answers({"success": False, "error-message": f"Using SuperLink: here (127.0.0.1:1)\n\n{message}"})

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFlwr:
    made = FakeFlwr(tmp_path)
    monkeypatch.setattr(flower, "_command", lambda: str(made.command))
    return made


@pytest.fixture
def link() -> SuperLink:
    return SuperLink(Connection("here", "127.0.0.1:1", insecure=True))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "hospital-a.pub"
    file.write_text(PUBLIC_KEY)
    return file


def test_a_key_is_registered_under_the_site_s_name(fake: FakeFlwr, link: SuperLink, key: Path) -> None:
    fake.answers({"success": True, "node-id": 6272594003578917462})
    assert link.register(key, "hospital-a") == "6272594003578917462"
    arguments = ["supernode", "register", str(key), "here", "--name", "hospital-a", "--format", "json"]
    assert [call["arguments"] for call in fake.calls] == [arguments]


def test_flower_reports_nothing_home_and_installs_nothing(
    fake: FakeFlwr, link: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.delenv("FLWR_DISABLE_UPDATE_CHECK")
    monkeypatch.setenv("FORCE_COLOR", "1")
    fake.answers({"success": True, "nodes": []})
    assert link.nodes() == []
    environment = fake.calls[0]["environment"]
    assert {name: environment[name] for name in flower.QUIET} == flower.QUIET
    assert "FORCE_COLOR" not in environment


def test_nodes_are_read(fake: FakeFlwr, link: SuperLink) -> None:
    entry = {"node-id": "77", "status": "online", "created-at": "c", "online-at": "o", "offline-at": "N/A"}
    fake.answers({"success": True, "nodes": [{**entry, "owner-name": "none"}]})
    assert link.nodes() == [Node("77", "online", "c", "o", "")]


def test_a_run_is_sent_with_every_setting(fake: FakeFlwr, link: SuperLink, tmp_path: Path) -> None:
    config = RunConfig.from_flat(
        {"name": 'a "b" \\ ü \x7f', "giva.rank": 3, "task.labels": ["no", "yes"], "train.head-epsilon": 1e-8}
    )
    fake.answers('something first\n{"success": true, "run-id": "7645786948656554014"}')
    assert link.start_run(tmp_path, config) == "7645786948656554014"
    call = fake.calls[0]
    assert call["arguments"][:4] == ["run", str(tmp_path), "here", "--run-config"]
    assert not Path(call["arguments"][4]).exists()
    assert flatten(tomllib.loads(call["run"])) == config.to_flat()


@pytest.mark.parametrize("code", [16, 18])
def test_a_run_that_is_over_needs_no_stop(fake: FakeFlwr, link: SuperLink, code: int) -> None:
    fake.answers({"success": True, "run-id": "5"})
    assert link.stop_run("5") is True
    fake.fails(f"[code: {code}] Run is already finished.")
    assert link.stop_run("5") is False
    fake.fails("[code: 9] You do not have permission to perform this action.")
    with pytest.raises(SuperLinkError, match=r"`flwr stop` failed at SuperLink here; got .*permission"):
        link.stop_run("5")


def test_the_status_of_a_run(fake: FakeFlwr, link: SuperLink) -> None:
    fake.answers({"success": True, "runs": [{"run-id": "5", "status": "finished:stopped"}]})
    assert link.run_status("5") == "finished:stopped"
    fake.fails("[code: 16] Run ID not found.")
    assert link.run_status("5") == ""


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("[code: 23] Public key already in use.", "a key that was revoked is never taken again"),
        ("[code: 24] Node ID not found for account.", "knows no such site"),
        ("Something new.", "`flwr supernode list` failed at SuperLink here; got .*Something new"),
    ],
)
def test_a_refusal_says_what_to_do(fake: FakeFlwr, link: SuperLink, message: str, words: str) -> None:
    fake.fails(message)
    with pytest.raises(SuperLinkError, match=words):
        link.nodes()


def test_a_traceback_instead_of_json_is_a_failure_too(fake: FakeFlwr, link: SuperLink) -> None:
    fake.answers("", stderr="Traceback\nKeyError: 'x'\n", code=1)
    with pytest.raises(SuperLinkError, match="KeyError: 'x'"):
        link.nodes()


def test_an_unreachable_superlink_is_looked_at(fake: FakeFlwr) -> None:
    fake.fails("Connection to the SuperLink is unavailable. Please check your network connection")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SuperLinkError, match=r"cannot be reached; got Connection refused.*it is not started"):
        SuperLink(Connection("here", f"127.0.0.1:{port}", insecure=True)).nodes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n", "is a private key; expected the site's public key"),
        ("ssh-ed25519 AAAA x\n", "no public key that Flower takes; got 'ssh-ed25519 AAAA x"),
        (None, "there is no key"),
    ],
)
def test_other_files_than_public_keys_are_not_sent(
    fake: FakeFlwr, link: SuperLink, tmp_path: Path, content: str | None, words: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        link.register(file, "hospital-a")
    assert not (tmp_path / "calls").exists()


def make_app(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text("[tool.flwr.app]\npublisher = 'x'\n")
    return folder


def test_the_app_is_the_one_named_else_the_one_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, set_, here = (make_app(tmp_path / name) for name in ("named", "set", "here"))
    monkeypatch.chdir(here)
    assert app_folder(None) == here
    monkeypatch.setenv("GIVA_APP", str(set_))
    assert app_folder(None) == set_
    assert app_folder(named) == named
    monkeypatch.delenv("GIVA_APP")
    monkeypatch.chdir(tmp_path)
    assert app_folder(None) == Path(flower.__file__).parents[1]


def test_a_folder_without_an_app_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    with pytest.raises(ConfigError, match="is no Flower app"):
        app_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flower, "__file__", str(tmp_path / "lib" / "server" / "flower.py"))
    with pytest.raises(ConfigError, match=r"installed from a wheel.*--app or GIVA_APP"):
        app_folder(None)


def test_the_command_is_looked_for_beside_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(DependencyError, match="flwr is not installed"):
        flower._command()
    (tmp_path / "flwr").touch()
    assert flower._command() == str(tmp_path / "flwr")


def test_a_log_that_breaks_off_is_an_error(
    fake: FakeFlwr, link: SuperLink, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    fake.answers("round 1\n")
    link.stream_log("5")
    assert capfd.readouterr().out == ""
    assert fake.calls[0]["arguments"] == ["log", "5", "here", "--stream"]
    fake.answers("", code=1)
    with pytest.raises(SuperLinkError, match="the log of run 5 broke off"):
        link.stream_log("5")
