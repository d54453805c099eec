"""What a trainer knows of its site: name, data, device, limits. Made from a site file, or for a simulated site.

A deployed site's worker reads its own site file (`site_file.py`). A simulated site, on a machine that says
`GIVA_SIMULATION=1`, takes its sub-folder of `data.folder`, and server and sites trust each other: they are one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giva_core.config import DataConfig, RunConfig
from giva_core.errors import ConfigError, DataError
from giva_core.sites import SITE_NAME, site_folders

if TYPE_CHECKING:
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
        model_digest: SHA-256 that the base model has to have; empty for any.
    """

    name: str
    folder: Path
    data: DataConfig
    device: str
    policy: Policy | None = None
    model_digest: str = ""

    @property
    def train_path(self) -> Path:
        """The training rows."""
        return self.folder / self.data.train_file

    @property
    def eval_path(self) -> Path | None:
        """The evaluation rows, if the site has any."""
        return self.folder / self.data.eval_file if self.data.eval_file else None


def is_simulated(node_config: Mapping[str, Any]) -> bool:
    """Whether server and sites are one machine. Its environment has to say so: a partition alone proves nothing."""
    return "partition-id" in node_config and os.environ.get("GIVA_SIMULATION") == "1"


def site_settings(config: RunConfig, node_config: Mapping[str, Any]) -> SiteSettings:
    """The settings of a simulated site.

    Args:
        config: The run's configuration.
        node_config: The node's own; Flower's simulation sets `partition-id`.

    Raises:
        DataError: There is no such partition.
    """
    index, folders = int(node_config["partition-id"]), site_folders(config.data)
    if index >= len(folders):
        raise DataError(
            "there is no data for this partition",
            got=f"partition-id {index}",
            expected=f"0 to {len(folders) - 1}",
            cause="more simulated nodes than site folders",
            remedy="start as many nodes as there are folders",
            public=f"no data for partition {index}",
        )
    return SiteSettings(checked_name(folders[index].name), folders[index], config.data, config.train.device)


def checked_name(name: str) -> str:
    """`name`, where it may be a site's: it becomes part of tables, files and logs.

    Raises:
        ConfigError: It has other characters than letters, digits, `.`, `_` and `-`.
    """
    if not SITE_NAME.fullmatch(name):
        raise ConfigError("a site's name has other characters than letters, digits, '.', '_' and '-'", got=repr(name))
    return name
