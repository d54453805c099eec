"""What a simulated site is, and that a partition alone makes none."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.site import checked_name, is_simulated, site_settings
from giva_core.config import RunConfig
from giva_core.errors import ConfigError, DataError, public_reason
from giva_core.sites import site_folders


@pytest.fixture
def simulated(tmp_path: Path) -> RunConfig:
    """A run whose data lies in three folders, and a file beside them."""
    for name in ("site-c", "site-a", "site-b"):
        (tmp_path / name).mkdir()
    (tmp_path / "labels.json").write_text("[]", encoding="utf-8")
    return RunConfig.from_flat({"data.folder": str(tmp_path), "train.device": "mps"})


@pytest.mark.parametrize(
    ("value", "node", "expected"),
    [
        ("1", {"partition-id": 0, "num-partitions": 3}, True),
        ("1", {"worker": "/run/giva/worker.sock"}, False),
        (None, {"partition-id": 0}, False),
        ("", {"partition-id": 0}, False),
        ("0", {"partition-id": 0}, False),
        ("true", {"partition-id": 0}, False),
    ],
)
def test_a_partition_alone_is_no_simulation(
    monkeypatch: pytest.MonkeyPatch, value: str | None, node: dict[str, object], expected: bool
) -> None:
    if value is None:
        monkeypatch.delenv("GIVA_SIMULATION")
    else:
        monkeypatch.setenv("GIVA_SIMULATION", value)
    assert is_simulated(node) is expected


@pytest.mark.parametrize(("partition", "name"), [(0, "site-a"), (1, "site-b"), (2, "site-c")])
def test_a_simulated_site_is_a_folder_by_name(simulated: RunConfig, partition: int, name: str) -> None:
    site = site_settings(simulated, {"partition-id": partition, "num-partitions": 3})
    assert (site.name, site.folder.name, site.device, site.policy) == (name, name, "mps", None)
    assert site.train_path == Path(simulated.data.folder) / name / "train.jsonl"
    assert site.eval_path == Path(simulated.data.folder) / name / "test.jsonl"


def test_a_site_may_have_no_evaluation_rows(simulated: RunConfig) -> None:
    assert site_settings(simulated.replace(data__eval_file=""), {"partition-id": 0}).eval_path is None


def test_more_nodes_than_folders(simulated: RunConfig) -> None:
    with pytest.raises(DataError, match="got partition-id 3; expected 0 to 2") as caught:
        site_settings(simulated, {"partition-id": 3})
    assert public_reason(caught.value) == "data: no data for partition 3"


@pytest.mark.parametrize("folder", ["", "missing", "empty"])
def test_no_folders_to_simulate(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    config = RunConfig.from_flat({"data.folder": str(tmp_path / folder) if folder else ""})
    with pytest.raises(DataError, match="no sites to simulate") as caught:
        site_folders(config.data)
    assert str(tmp_path) not in public_reason(caught.value)


def test_site_folders_may_lie_under_giva_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVA_HOME", str(tmp_path))
    (tmp_path / "data" / "only").mkdir(parents=True)
    config = RunConfig.from_flat({"data.folder": "$GIVA_HOME/data"})
    assert site_folders(config.data) == [tmp_path / "data" / "only"]


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "../a", "ä", "a\n", "x" * 64, "a;b"])
def test_names_have_plain_characters(name: str) -> None:
    with pytest.raises(ConfigError, match="has other characters"):
        checked_name(name)


@pytest.mark.parametrize("name", ["a", "7", "Site_1.b-c", "x" * 63])
def test_names_that_are_fine(name: str) -> None:
    assert checked_name(name) == name
