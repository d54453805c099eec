"""What sites are called, and where simulated ones lie: server and client count the same folders in the same order."""

from __future__ import annotations

import re
from pathlib import Path

from .config import DataConfig
from .errors import DataError
from .paths import expand

#: What a site may be called; the name becomes part of tables, files and logs.
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def site_folders(data: DataConfig) -> list[Path]:
    """The sub-folders of `data.folder`, one for each simulated site, sorted by name.

    Raises:
        DataError: There is no such folder, or nothing in it.
    """
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
