"""What a site knows by itself: its name, where its data lies, its device. The server's word on these does not count.

The node's own configuration comes first (`flower-supernode --node-config 'site="a" data-path="/data"'`), then, but
only in simulation, `data.folder` with a sub-folder for each site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from giva_core.config import DataConfig, RunConfig
from giva_core.errors import ConfigError, DataError
from giva_core.paths import expand
from giva_core.protocol import SITE_NAME


@dataclass(frozen=True)
class SiteSettings:
    """One site.

    Attributes:
        name: What the operator knows the site by: letters, digits, `.`, `_`, `-`.
        folder: Where its data files lie.
        data: File names and columns.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
    """

    name: str
    folder: Path
    data: DataConfig
    device: str

    @property
    def train_path(self) -> Path:
        """The training rows."""
        return self.folder / self.data.train_file

    @property
    def eval_path(self) -> Path | None:
        """The evaluation rows, if the site has any."""
        return self.folder / self.data.eval_file if self.data.eval_file else None


def site_folders(data: DataConfig) -> list[Path]:
    """The sub-folders of `data.folder`, one for each simulated site, sorted by name."""
    root = expand(data.folder)
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if data.folder and root.is_dir() else []
    if not folders:
        raise DataError(
            "there are no sites to simulate",
            got=f"data.folder = '{data.folder}'",
            expected="a folder with one sub-folder for each site",
            cause="the data is not prepared yet, or lies elsewhere",
            remedy="run `giva data prepare`, or correct data.folder",
            public="data.folder has no sites",
        )
    return folders


def site_settings(config: RunConfig, node_config: Mapping[str, Any]) -> SiteSettings:
    """The settings of this site.

    Args:
        config: The run's configuration; only its `data` and `train.device` are read, as defaults.
        node_config: The node's own: `site`, `data-path`, `device` and any key of `data` (`text-column`, ...); Flower's
            simulation sets `partition-id`.

    Raises:
        ConfigError: The node names neither a data path nor a partition, its name has other characters, or the run
            names a file outside the site's folder.
        DataError: There is no such partition.
    """
    own = {key.replace("-", "_"): value for key, value in node_config.items()}
    columns = {key: str(own[key]) for key in vars(config.data) if key in own and key != "folder"}
    data = replace(config.data, **columns)
    for key in {"train_file", "eval_file"} - set(columns):
        _check_inside(key, getattr(data, key))
    if "data_path" in own:
        folder = Path(str(own["data_path"])).expanduser()
    elif "partition_id" in own:
        folders = site_folders(config.data)
        index = int(own["partition_id"])
        if index >= len(folders):
            raise DataError(
                "there is no data for this partition",
                got=f"partition-id {index}",
                expected=f"0 to {len(folders) - 1}",
                cause="more simulated nodes than site folders",
                remedy="start as many nodes as there are folders",
                public=f"no data for partition {index}",
            )
        folder = folders[index]
    else:
        raise ConfigError(
            "this node does not say where its data lies",
            expected="data-path in the node's configuration",
            remedy='start it with --node-config \'site="NAME" data-path="/absolute/folder"\'',
            public="the node's configuration has no data-path",
        )
    name = str(own.get("site", folder.name))
    if not SITE_NAME.fullmatch(name):
        raise ConfigError("a site's name has other characters than letters, digits, '.', '_' and '-'", got=repr(name))
    return SiteSettings(name, folder, data, str(own.get("device", config.train.device)))


def local_config(config: RunConfig, node_config: Mapping[str, Any]) -> RunConfig:
    """The run's configuration with what only the site decides: which model folder is read, and whether a hub is asked.

    Args:
        config: The run's configuration, as it came from the server.
        node_config: The node's own: `model-path`, and `allow-model-hub` for a site that may ask a model hub.

    Raises:
        ConfigError: A deployed node does not say where its model lies.
    """
    own = {key.replace("-", "_"): value for key, value in node_config.items()}
    if "partition_id" in own and "data_path" not in own:
        return config  # a simulation: server and sites are one machine
    if "model_path" not in own:
        raise ConfigError(
            "this node does not say where its model lies",
            expected="model-path in the node's configuration",
            cause="the run's model.path is the server's word, and the server does not choose what a site reads",
            remedy="start it with --node-config '... model-path=\"/absolute/folder\"'",
            public="the node's configuration has no model-path",
        )
    is_offline = config.model.local_files_only or own.get("allow_model_hub") is not True
    return replace(config, model=replace(config.model, path=str(own["model_path"]), local_files_only=is_offline))


def _check_inside(key: str, name: str) -> None:
    """The run may say what a file is called, not where on this machine it lies."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"the run's data.{key.replace('_', '-')} leads out of the site's folder",
            got=repr(name),
            expected="a name inside it",
            remedy="let the site itself name such a file in its node configuration",
            public=f"data.{key.replace('_', '-')} leads out of the site's folder",
        )
