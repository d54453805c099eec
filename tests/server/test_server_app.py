"""The ServerApp refuses what the sites would refuse, before it asks them anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from giva_core.config import RunConfig
from giva_core.errors import ConfigError
from server.app import app, continued_config
from server.local_grid import LocalGrid
from server.run_store import RunStore, default_root

STORED = RunConfig.from_flat({"giva.rank": 3, "rounds.num-rounds": 9})


def start(**flat: object) -> None:
    config = RunConfig.from_flat(flat)
    grid = LocalGrid(lambda message, context: message, {}, config.to_flat())
    app(grid, Context(1, 1, {}, RecordDict(), config.to_flat()))  # type: ignore[arg-type]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunStore:
    monkeypatch.setenv("GIVA_HOME", str(tmp_path))
    return RunStore(default_root())


def test_a_continued_run_needs_the_settings_it_began_with() -> None:
    again = STORED.replace(resume="abc", model__path="/elsewhere")
    assert continued_config(again, STORED) == STORED
    with pytest.raises(ConfigError, match=r"add the line resume = \"abc\""):
        continued_config(RunConfig(resume="abc"), STORED)


def test_resume_alone_is_refused_before_the_sites_are_asked(home: RunStore) -> None:
    run_id = home.create_run(STORED, "flower", {})
    home.set_status(run_id, "failed", "for the test")
    with pytest.raises(ConfigError, match="another configuration than the stored run's"):
        start(resume=run_id)
    assert home.rounds(run_id) == [] and home.run(run_id).reason == "for the test"


def test_a_refused_strategy_leaves_no_run_behind(home: RunStore) -> None:
    with pytest.raises(ConfigError, match="not a known strategy"):
        start(**{"strategy.name": "no-such"})
    assert home.runs() == []
