"""What rounding took from a site's updates, kept until its next one (error feedback).

A site's update travels in one byte a number; what that loses is added to the site's next update. It is kept on disk,
by run and round: a round that is tried again, and a run that goes on from an earlier round, find what was kept before
that round, so that they give the same bytes. Where the folder was emptied the feedback starts again at 0, and the run
goes on: a rounding error is lost then, as it would be without feedback.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from giva_core.paths import giva_home
from giva_core.types import Arrays

_KEPT_ROUNDS = 3  # a run goes on from the round before the last at worst
_KEPT_RUNS = 8


@dataclass(frozen=True)
class Feedback:
    """The feedback of one site in one run.

    Attributes:
        folder: Where it is kept.
        key: Name of the round, which sorts in the order of rounds.
    """

    folder: Path
    key: str

    @classmethod
    def of(cls, run: str, site: str, server_round: int, is_head_round: bool) -> Feedback:
        """The feedback for a round; the run's id is the server's word, and names a folder as a digest only."""
        folders = [hashlib.sha256(name.encode()).hexdigest()[:32] for name in (run, site)]
        key = f"{'head' if is_head_round else 'train'}-{server_round:08d}"
        return cls((giva_home() / "cache" / "feedback").joinpath(*folders), key)

    def before(self) -> Arrays:
        """What earlier rounds lost, by name; empty where nothing is kept."""
        earlier = [file for file in self._files() if file.stem < self.key]
        if not earlier:
            return {}
        try:
            return safetensors.numpy.load_file(earlier[-1])
        except (OSError, SafetensorError):
            return {}  # a lost rounding error, as where the folder was emptied

    def keep(self, lost: Arrays) -> None:
        """Keep what this round lost, and forget later rounds, which are to come again, and old ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{self.key}.tmp"
        temporary.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in lost.items()}))
        temporary.replace(self.folder / f"{self.key}.safetensors")
        files = self._files()
        kept = [file for file in files if file.stem <= self.key][-_KEPT_ROUNDS:]
        for file in set(files) - set(kept):
            file.unlink(missing_ok=True)
        os.utime(self.folder.parent)  # the newest of the runs, though its folder has been there for long
        self._prune_runs()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def _prune_runs(self) -> None:
        """Keep the newest runs' folders; another process may do the same at the same time."""
        found = []
        for folder in self.folder.parent.parent.iterdir():
            with suppress(FileNotFoundError):
                found.append((folder.stat().st_mtime_ns, folder))
        for _, folder in sorted(found)[:-_KEPT_RUNS]:
            shutil.rmtree(folder, ignore_errors=True)
