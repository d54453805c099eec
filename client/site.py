"""What a site knows by itself: its name, where its data lies, its device. The server's word on these does not count.

A deployed node says them in its own configuration (`flower-supernode --node-config 'site="a" data-path="/data"'`) and
guards itself by a `Policy`. A simulated one, on a machine that says `GIVA_SIMULATION=1`, takes its sub-folder of
`data.folder`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from giva_core.config import DataConfig, RunConfig
from giva_core.errors import ConfigError, DataError
from giva_core.paths import expand
from giva_core.protocol import SITE_NAME
from giva_core.sites import site_folders

from .policy import Policy


@dataclass(frozen=True)
class SiteSettings:
    """One site.

    Attributes:
        name: What the operator knows the site by: letters, digits, `.`, `_`, `-`.
        folder: Where its data files lie.
        data: File names and columns.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        policy: What a server may ask; None where no other machine asks: in a simulation, and without a federation.
    """

    name: str
    folder: Path
    data: DataConfig
    device: str
    policy: Policy | None = None

    @property
    def train_path(self) -> Path:
        """The training rows."""
        return self.folder / self.data.train_file

    @property
    def eval_path(self) -> Path | None:
        """The evaluation rows, if the site has any."""
        return self.folder / self.data.eval_file if self.data.eval_file else None


def site_settings(config: RunConfig, node_config: Mapping[str, Any]) -> SiteSettings:
    """The settings of this site.

    Args:
        config: The run's configuration. A deployed node reads `train.device` of it, as the default, and nothing else;
            a simulated one reads `data` as well.
        node_config: The node's own: `site`, `data-path`, `device`, any key of `data` (`text-column`, ...) and of
            `Policy`; Flower's simulation sets `partition-id`.

    Raises:
        ConfigError: The node does not say its name or where its data lies, or one of its settings is not usable.
        DataError: There is no such partition.
    """
    own = _underscored(node_config)
    device = str(own.get("device", config.train.device))
    columns = {key: str(own[key]) for key in vars(config.data) if key in own and key != "folder"}
    if _is_simulated(own):
        folder = _partition(config.data, int(own["partition_id"]))
        return SiteSettings(_site_name(own.get("site", folder.name)), folder, replace(config.data, **columns), device)
    for key in ("data_path", "site"):
        if key not in own:
            raise ConfigError(
                f"this node does not say {'where its data lies' if key == 'data_path' else 'what its site is called'}",
                expected=f"{key.replace('_', '-')} in the node's configuration",
                remedy='start it with --node-config \'site="NAME" data-path="/absolute/folder" ...\'; '
                "to simulate all sites on this machine, set GIVA_SIMULATION=1 in its environment",
                public=f"the node's configuration has no {key.replace('_', '-')}",
            )
    policy = Policy.from_node_config(node_config)
    return SiteSettings(_site_name(own["site"]), expand(str(own["data_path"])), DataConfig(**columns), device, policy)


def local_config(config: RunConfig, node_config: Mapping[str, Any]) -> RunConfig:
    """The run's configuration with what only the site decides: which model folder is read, and whether a hub is asked.

    Args:
        config: The run's configuration, as it came from the server.
        node_config: The node's own: `model-path`, and `allow-model-hub` for a site that may ask a model hub.

    Raises:
        ConfigError: A deployed node does not say where its model lies.
    """
    own = _underscored(node_config)
    if _is_simulated(own):
        return config
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


def _underscored(node_config: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in node_config.items()}


def _is_simulated(own: Mapping[str, Any]) -> bool:
    """Whether server and sites are one machine. Its environment has to say so: a partition alone proves nothing."""
    return "partition_id" in own and "data_path" not in own and os.environ.get("GIVA_SIMULATION") == "1"


def _partition(data: DataConfig, index: int) -> Path:
    folders = site_folders(data)
    if index >= len(folders):
        raise DataError(
            "there is no data for this partition",
            got=f"partition-id {index}",
            expected=f"0 to {len(folders) - 1}",
            cause="more simulated nodes than site folders",
            remedy="start as many nodes as there are folders",
            public=f"no data for partition {index}",
        )
    return folders[index]


def _site_name(name: Any) -> str:
    if not SITE_NAME.fullmatch(str(name)):
        raise ConfigError(
            "a site's name has other characters than letters, digits, '.', '_' and '-'", got=repr(str(name))
        )
    return str(name)
