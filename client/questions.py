"""What was asked of this site in each run, on disk, so that limits that count within a run survive a restart.

Only digests are kept. A question that comes again, word for word, is the same question: it has the same answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

from giva_core.errors import ProtocolError
from giva_core.protocol import Payload

_RUN = re.compile(r"[0-9]{1,20}")
_KEPT_RUNS = 256


def question_digest(kind: str, payload: Payload) -> str:
    """SHA-256 (hex) over a question's kind, values and arrays."""
    digest = hashlib.sha256(json.dumps([kind, payload.values], sort_keys=True).encode())
    for name, array in sorted(payload.arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


class Questions:
    """The different questions of one run.

    Args:
        folder: Where the site keeps them, one file for each run; the newest 256 stay.
        run: The run's id, decimal.

    Raises:
        ProtocolError: That is no id of a run.
    """

    def __init__(self, folder: Path, run: str) -> None:
        if not _RUN.fullmatch(run):
            raise ProtocolError("that is no id of a run", got=repr(run[:40]), public="the run has no usable id")
        self._path = folder / f"{run}.json"

    def pin(self, config_digest: str) -> None:
        """Hold the run to the configuration of its first question: each limit counts for one plan.

        Raises:
            ProtocolError: This question comes with another one.
        """
        known = self._read().get("config")
        if known is None:
            self.remember("config", config_digest)
        elif known != [config_digest]:
            raise ProtocolError(
                "the run's configuration is another one than at its first question",
                got=f"{config_digest[:12]}…",
                expected=f"{known[0][:12]}…",
                remedy="start a new run",
                public="the run's configuration has changed",
            )

    def with_one_more(self, stage: str, digest: str) -> int:
        """How many different questions of this stage there would be with this one."""
        return len({*self._read().get(stage, []), digest})

    def remember(self, stage: str, digest: str) -> None:
        """Count this question; the file is complete on disk when this returns."""
        asked = self._read()
        if digest in asked.get(stage, []):
            return
        asked.setdefault(stage, []).append(digest)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".", delete=False) as file:
            try:
                file.write(json.dumps(asked).encode())
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, self._path)
            finally:
                Path(file.name).unlink(missing_ok=True)  # still there only where one of these failed
        self._prune()

    def _read(self) -> dict[str, list[str]]:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def _prune(self) -> None:
        found = sorted(self._path.parent.glob("[0-9]*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in found[:-_KEPT_RUNS]:
            path.unlink(missing_ok=True)
