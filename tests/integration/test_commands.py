"""The commands as a user types them, in processes of their own: simulate, SIGKILL, resume, train, Flower's engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from giva_core.config import RunConfig
from server.run_store import RunStore

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
GIVA = [sys.executable, "-c", "from server.cli.main import main; main()"]


@pytest.fixture
def config_file(toy_config: RunConfig, tmp_path: Path) -> Path:
    """The toy run as a TOML file, with rounds long enough to be killed in."""
    config = toy_config.replace(rounds__num_rounds=5, train__local_epochs=2)
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.to_flat().items() if value != ""]
    path = tmp_path / "run.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def giva(*args: object, home: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*GIVA, *map(str, args)], capture_output=True, text=True, env={**os.environ, "GIVA_HOME": str(home)}, cwd=home
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def data_of(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout)["data"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def test_simulate_then_look_at_the_run(config_file, home):
    done = giva("simulate", config_file, "--set", "rounds.num-rounds=2", "--plot", "run.png", "--json", home=home)
    answer = data_of(done)
    assert answer["status"] == "completed" and answer["rounds_done"] == 2
    assert (home / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "round 2/2" in done.stderr and "Error" not in done.stderr
    assert [row["phase"] for row in data_of(giva("round", "list", "--json", home=home))["rounds"]][-1] == "train"
    assert data_of(giva("adapter", "verify", answer["run_id"], "--json", home=home))
    plot = giva("metrics", "plot", answer["run_id"], "--output", home / "plot.png", home=home)
    assert (home / "plot.png").read_bytes().startswith(b"\x89PNG"), plot.stderr


def test_a_run_killed_in_round_3_resumes_to_the_bytes_of_one_never_killed(config_file, home):
    whole = data_of(giva("simulate", config_file, "--json", home=home))
    environment = {**os.environ, "GIVA_HOME": str(home)}
    command = [*GIVA, "simulate", str(config_file)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        for line in run.stderr:
            if line.startswith("round 2/5"):
                run.send_signal(signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    store = RunStore(home / "store")
    broken = store.runs()[0]
    assert broken.run_id != whole["run_id"] and broken.rounds_done == 2
    resumed = data_of(giva("run", "resume", broken.run_id, "--json", home=home))
    assert resumed["status"] == "completed" and resumed["facts"] == whole["facts"]
    first, second = store.last_state(whole["run_id"]).arrays, store.last_state(broken.run_id).arrays
    assert all(first[name].tobytes() == second[name].tobytes() for name in first) and first.keys() == second.keys()


def test_train_alone(config_file, toy_folder, home):
    output = home / "adapter"
    done = giva("train", config_file, "--data", toy_folder / "site-1", "--output", output, "--json", home=home)
    answer = data_of(done)
    assert len(answer["rounds"]) == 6 and (output / "adapter.json").is_file()
    assert data_of(giva("adapter", "show", output, "--json", home=home))
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    federation = giva("train", config_file, "--data", toy_folder, "--output", home / "no", home=home, check=False)
    assert f"name one site's folder, as --data {toy_folder / 'site-1'}" in federation.stderr
    again = giva("train", config_file, "--data", toy_folder / "site-1", "--output", output, home=home, check=False)
    assert again.returncode == 2 and "is there already" in again.stderr and "--force" in again.stderr
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["giva.rank=0"], 2, "giva.rank is too small"),
        (["giva.colour=1"], 2, "there is no setting 'giva.colour'"),
        (["data.folder=/nowhere"], 1, "there are no sites to simulate"),
        (["strategy.name=magic"], 2, "strategy.name is not a known strategy"),
    ],
)
def test_bad_settings_are_one_clear_sentence(config_file, home, settings, code, message):
    flags = [part for setting in settings for part in ("--set", setting)]
    done = giva("simulate", config_file, *flags, home=home, check=False)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.ray
def test_flowers_simulation_engine_gives_the_same_digests(config_file, home, tmp_path):
    mine = data_of(giva("simulate", config_file, "--set", "rounds.num-rounds=2", "--json", home=home))
    port = "39187"
    environment = {
        **os.environ,
        "GIVA_HOME": str(home),
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    text = config_file.read_text().replace("rounds.num-rounds = 5", "rounds.num-rounds = 2")
    config_file.write_text(text)
    command = [str(BIN / "flwr"), "run", str(PROJECT), "--stream", "--run-config", str(config_file)]
    nodes = "num-supernodes=3 client-resources-num-cpus=1"
    try:
        done = subprocess.run(
            [*command, "--federation-config", nodes], capture_output=True, text=True, env=environment, timeout=400
        )
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if "flower-superlink" in " ".join(process.info["cmdline"] or []) and port in " ".join(
                process.info["cmdline"]
            ):
                process.kill()
    store = RunStore(home / "store")
    theirs = store.runs()[0]
    assert (theirs.engine, theirs.status) == ("flower", "completed"), done.stdout[-3000:] + done.stderr[-3000:]
    assert {name: fact for name, fact in theirs.facts.items() if name != "flower_run_id"} == mine["facts"]
    first, second = store.last_state(theirs.run_id).arrays, store.last_state(mine["run_id"]).arrays
    assert all(np.array_equal(first[name], second[name]) for name in first)
