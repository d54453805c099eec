"""`giva site` at a site: check, status, worker, start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from live_worker import ROOMY, ROOT, site_toml
from task_kinds import KINDS, OPEN, ROWS, SITES, deployed, kind_config, write_kind

from client import checks
from client.cli.site import _status_rows
from client.cli.site import site as site_group
from client.supervise import Program
from client.wire import worker_pb2 as pb
from giva_core.config import RunConfig
from giva_core.models import load_task_model
from server.cli.main import cli


def giva(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and data of the answer."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)["data"]


@pytest.fixture
def site_file(toy_model: Path, toy_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(site_toml("toy", toy_model, toy_folder / "site-1", worker={"socket": str(tmp_path / "w.sock")}))
    return path


@pytest.fixture
def run_file(toy_config: RunConfig, tmp_path: Path) -> Path:
    lines = [
        f"{key} = {json.dumps(value)}" for key, value in toy_config.replace(**ROOMY).to_flat().items() if value != ""
    ]
    path = tmp_path / "run.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_network", lambda site: checks.Check("network", True, "the worker can leave it"))


@pytest.mark.usefixtures("leaving")
def test_a_site_that_can_join(site_file: Path, toy_model: Path) -> None:
    code, data = giva("site", "check", site_file)
    found = {entry["what"]: entry["found"] for entry in data["checks"]}
    assert code == 0 and data["ok"]
    assert found["train.jsonl"].startswith("24 rows") and found["test.jsonl"].startswith("11 rows")
    assert found["bases"] == "the same as on every machine"
    digest = found[f"model {toy_model.name}"].split()[1].rstrip(";")
    assert len(digest) == 64
    text = site_file.read_text().replace(
        f"[models.{toy_model.name}]", f"[models.{toy_model.name}]\ndigest = '{digest}'"
    )
    site_file.write_text(text)
    assert giva("site", "check", site_file)[0] == 0
    site_file.write_text(text.replace(digest, "0" * 64))
    assert giva("site", "check", site_file)[0] == 1


_FILES = (("train", "train.jsonl"), ("eval", "test.jsonl"))


@pytest.mark.usefixtures("leaving")
@pytest.mark.parametrize(
    ("case", "columns"),
    [
        ("causal-lm", "prompt and completion"),
        ("chat", "messages"),
        ("seq2seq", "prompt and completion"),
        ("image-classification", "image and label"),
    ],
)
def test_a_site_of_another_kind_is_told_its_rows_and_its_run_s_digest(tmp_path: Path, case: str, columns: str) -> None:
    model = write_kind(tmp_path, case)
    config = kind_config(case, tmp_path, model)
    path, run = tmp_path / "site.toml", tmp_path / "run.toml"
    path.write_text(site_toml("a", model, tmp_path / "sites" / SITES[0], data=KINDS[case].data, policy=OPEN))
    run.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in deployed(config).to_flat().items()))
    files = [KINDS[case].data.get(f"{key}-file", default) for key, default in _FILES]
    digest = load_task_model(config).weights_digest()
    for arguments in ((), ("--config", run)):
        code, data = giva("site", "check", path, *arguments)
        assert code == 0, data["checks"]
        found = {entry["what"]: entry["found"].split(";")[0] for entry in data["checks"]}
        what = "" if arguments else f" of {columns}"
        assert [found[name] for name in files] == [f"{ROWS[split][0]} rows{what}" for split in ("train", "test")]
        assert found[f"model {model.name}"] == f"digest {digest} for task.kind = {config.task.kind}"
        assert found["methods"].startswith("giva, lora")


@pytest.mark.usefixtures("leaving")
def test_methods_that_need_what_is_not_installed(
    site_file: Path, toy_model: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.needs.find_spec", lambda name: None if name == "peft" else name)
    assert giva("site", "check", site_file)[0] == 0
    site_file.write_text(site_toml("toy", toy_model, toy_folder / "site-1", policy={"methods": ["giva", "vera"]}))
    code, data = giva("site", "check", site_file)
    [wrong] = [entry for entry in data["checks"] if not entry["ok"]]
    assert code == 1 and wrong["what"] == "methods"
    assert "vera needs PEFT" in wrong["found"] and "fedgiva[peft]" in wrong["found"]


@pytest.mark.usefixtures("leaving")
def test_a_run_s_labels_and_the_policy_are_held_against_the_site(site_file: Path, run_file: Path) -> None:
    code, data = giva("site", "check", site_file, "--config", run_file)
    found = {entry["what"]: entry["found"] for entry in data["checks"]}
    assert code == 0 and found["train.jsonl"] == "24 rows"
    assert "for counts by class, which stay here" in found["the run and the policy"]
    run_file.write_text(
        run_file.read_text().replace('"[\\"left\\"', '"[\\"other\\"').replace("giva.rank = 2", "giva.rank = 99")
    )
    code, data = giva("site", "check", site_file, "--config", run_file)
    wrong = {entry["what"] for entry in data["checks"] if not entry["ok"]}
    assert code == 1 and wrong == {"train.jsonl", "test.jsonl", "the run and the policy"}


@pytest.mark.usefixtures("leaving")
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cannot be read"),
        ("", "holds no examples"),
        ('{"text": "a"}\n', "without label"),
        ("{\n", "row unreadable"),
    ],
)
def test_data_that_cannot_be_used(site_file: Path, tmp_path: Path, content: str | None, what: str) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    if content is not None:
        for name in ("train.jsonl", "test.jsonl"):
            (rows / name).write_text(content)
    site_file.write_text(site_toml("toy", tmp_path, rows))
    code, data = giva("site", "check", site_file)
    wrong = {entry["what"]: entry["found"] for entry in data["checks"] if not entry["ok"]}
    assert code == 1 and what in wrong["train.jsonl"] and len(wrong) == 3  # the folder of the model has none, too


def test_the_check_says_whether_the_network_can_be_left(
    site_file: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = checks._network(checks.SiteFile.read(site_file))
    assert found.ok == ("the worker can leave it" in found.found)
    assert found.ok or "cannot leave the network" in found.found
    host = tmp_path / "host.toml"
    host.write_text(site_toml("toy", toy_model, tmp_path, worker={"network": "host"}))
    assert "stays" in checks._network(checks.SiteFile.read(host)).found


def test_a_site_file_that_cannot_be_used_is_a_usage_error(tmp_path: Path) -> None:
    for verb in ("check", "status", "worker", "start"):
        result = CliRunner().invoke(cli, ["site", verb, str(tmp_path / "none.toml")])
        assert result.exit_code == 2 and "there is no site file" in result.stderr


def test_nobody_answers(site_file: Path) -> None:
    result = CliRunner().invoke(cli, ["site", "status", str(site_file)])
    assert result.exit_code == 1 and "the site's worker does not answer" in result.stderr


def test_status_for_people() -> None:
    busy = pb.StatusReply(
        busy=True, kind="train.round", run="7", round=3, step=4, steps=9, seconds=1.25, waiting=1, queue=4, done=5
    )
    rows = dict(_status_rows(busy))
    assert (rows["state"], rows["task"], rows["steps"]) == ("busy", "train.round of run 7, round 3", "4 of 9")
    assert rows["waiting"] == "1 of 4"
    idle = dict(_status_rows(pb.StatusReply(queue=4)))
    assert (idle["state"], idle["task"], idle["steps"], idle["seconds"]) == ("idle", "-", "-", None)


def test_start_supervises_both_programs(site_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Program] = []
    monkeypatch.setattr("client.supervise.site_programs", lambda path: [Program(path.name, (), {})])
    monkeypatch.setattr("client.supervise.supervise", lambda programs: seen.extend(programs) or 0)
    assert CliRunner().invoke(cli, ["site", "start", str(site_file)]).exit_code == 0
    assert [program.name for program in seen] == ["site.toml"]


def test_the_command_brings_up_a_worker(site_file: Path, tmp_path: Path) -> None:
    """Through `giva` itself, which must not import what starts threads before the network is left."""
    import tempfile

    from client.wire.link import Link

    with tempfile.TemporaryDirectory(prefix="giva-c-") as folder:
        text = site_file.read_text().replace(str(tmp_path / "w.sock"), f"{folder}/w.sock")
        site_file.write_text(text.replace("[worker]", f'[worker]\ncache = "{folder}/cache"'))
        command = [sys.executable, "-c", "from server.cli.main import main; main()", "site", "worker", str(site_file)]
        with subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE) as process:
            with Link(f"{folder}/w.sock", patience_seconds=60) as link:
                assert link.status().queue == 4
            code, data = giva("site", "status", site_file)
            assert code == 0 and data["queue"] == 4 and "network" in data["network"]
            process.terminate()
            assert process.wait(60) == 0
        assert not Path(folder, "w.sock").exists()


def test_a_group_of_its_own() -> None:
    assert set(site_group.commands) == {"worker", "start", "status", "check"}
