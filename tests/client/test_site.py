"""What a site knows by itself, and that the run's word does not come before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client.policy import Policy
from client.site import local_config, site_settings
from giva_core.config import DataConfig, RunConfig
from giva_core.errors import ConfigError, DataError, public_reason
from giva_core.sites import site_folders


@pytest.fixture
def simulated(tmp_path: Path) -> RunConfig:
    """A run whose data lies in three folders, and a file beside them."""
    for name in ("site-c", "site-a", "site-b"):
        (tmp_path / name).mkdir()
    (tmp_path / "labels.json").write_text("[]", encoding="utf-8")
    return RunConfig.from_flat({"data.folder": str(tmp_path)})


def test_deployed_site_says_everything_itself(tmp_path: Path, simulated: RunConfig) -> None:
    node = {
        "site": "hospital-a.1",
        "data-path": str(tmp_path / "own"),
        "text-column": "report",
        "train-file": "rows.csv",
        "device": "cuda:1",
        "partition-id": 0,
    }
    site = site_settings(simulated, node)
    assert (site.name, site.folder, site.device) == ("hospital-a.1", tmp_path / "own", "cuda:1")
    assert (site.data.text_column, site.data.label_column) == ("report", "label")
    assert site.train_path == tmp_path / "own" / "rows.csv"
    assert site.eval_path == tmp_path / "own" / "test.jsonl"


def test_run_s_word_on_a_deployed_site_s_data_does_not_count() -> None:
    run = {"data.label-column": "y", "data.eval-file": "", "data.train-file": "/etc/passwd", "data.folder": "/else"}
    config = RunConfig.from_flat({**run, "train.device": "mps"})
    site = site_settings(config, {"data-path": "/data/clinic", "site": "a", "folder": "/else"})
    assert site.data == DataConfig()
    assert (site.name, site.device, site.train_path) == ("a", "mps", Path("/data/clinic/train.jsonl"))


def test_a_deployed_site_says_its_name_and_where_its_data_lies(simulated: RunConfig) -> None:
    for node, key in (({"site": "a"}, "data-path"), ({"data-path": "/data"}, "site")):
        with pytest.raises(ConfigError, match=r"this node does not say .* GIVA_SIMULATION=1") as caught:
            site_settings(simulated, node)
        assert public_reason(caught.value) == f"config: the node's configuration has no {key}"


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_a_partition_alone_is_no_simulation(
    simulated: RunConfig, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("GIVA_SIMULATION")
    else:
        monkeypatch.setenv("GIVA_SIMULATION", value)
    node = {"partition-id": 0, "num-partitions": 3, "site": "a"}
    with pytest.raises(ConfigError, match="where its data lies"):
        site_settings(simulated, node)
    with pytest.raises(ConfigError, match="where its model lies"):
        local_config(simulated, node)


def test_only_a_simulated_site_goes_without_a_policy(simulated: RunConfig) -> None:
    assert site_settings(simulated, {"partition-id": 0}).policy is None
    node = {"site": "a", "data-path": "/data", "partition-id": 0}
    assert site_settings(simulated, node).policy == Policy()
    assert site_settings(simulated, {**node, "min-eval-examples": 50}).policy == Policy(min_eval_examples=50)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert site_settings(RunConfig(), {"site": "a", "data-path": "~/rows"}).folder == tmp_path / "rows"


@pytest.mark.parametrize(("partition", "name"), [(0, "site-a"), (1, "site-b"), (2, "site-c")])
def test_simulated_site_is_a_folder_by_name(simulated: RunConfig, partition: int, name: str) -> None:
    site = site_settings(simulated, {"partition-id": partition, "num-partitions": 3})
    assert (site.name, site.folder.name) == (name, name)
    assert site.train_path == Path(simulated.data.folder) / name / "train.jsonl"


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
        site_settings(RunConfig(), {"data-path": "/data", "site": name})


@pytest.mark.parametrize("name", ["a", "7", "Site_1.b-c", "x" * 63])
def test_names_that_are_fine(name: str) -> None:
    assert site_settings(RunConfig(), {"data-path": "/data", "site": name}).name == name


@pytest.mark.parametrize("name", ["/elsewhere/rows.csv", "../rows.csv", "sub/rows.csv"])
def test_site_itself_can(name: str) -> None:
    node: dict[str, Any] = {"site": "a", "data-path": "/data", "train-file": name}
    assert site_settings(RunConfig.from_flat({"data.train-file": "/x"}), node).train_path == Path("/data") / name


def test_a_deployed_site_chooses_its_model_and_whether_a_hub_is_asked() -> None:
    run = RunConfig.from_flat({"model.path": "/etc", "model.local-files-only": False})
    with pytest.raises(ConfigError, match="where its model lies") as caught:
        local_config(run, {"data-path": "/data"})
    assert public_reason(caught.value) == "config: the node's configuration has no model-path"
    own = local_config(run, {"data-path": "/data", "model-path": "/srv/model"})
    assert (own.model.path, own.model.local_files_only) == ("/srv/model", True)
    allowed = local_config(run, {"data-path": "/data", "model-path": "org/model", "allow-model-hub": True})
    assert (allowed.model.path, allowed.model.local_files_only) == ("org/model", False)
    assert own.digest() == run.digest() == allowed.digest()
    assert local_config(run, {"partition-id": 0, "num-partitions": 2}) == run
