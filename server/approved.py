"""Which site each registered node is: the operator's own list, `$GIVA_HOME/sites.json`.

Flower knows nodes by their keys and numbers them; `flwr supernode list` does not tell names. What the operator said
when approving a key is kept here, with the key's fingerprint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from giva_core.errors import ConfigError, StoreError
from giva_core.paths import giva_home


@dataclass(frozen=True)
class ApprovedSite:
    """A site whose key was approved.

    Attributes:
        node_id: Flower's id, as text.
        site: Its name.
        fingerprint: Of its key, as `ssh-keygen -lf` prints it.
        approved: UTC, ISO 8601.
    """

    node_id: str
    site: str
    fingerprint: str
    approved: str


class ApprovedSites:
    """The list in a file; missing, it reads as empty.

    Args:
        file: Where it lies; by default `$GIVA_HOME/sites.json`.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or giva_home() / "sites.json"

    def by_node(self) -> dict[str, ApprovedSite]:
        """Every site that was ever approved, by its node's id.

        Raises:
            StoreError: The file is damaged.
        """
        try:
            entries = json.loads(self.file.read_text(encoding="utf-8"))["sites"]
            return {entry["node_id"]: ApprovedSite(**entry) for entry in entries}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"the list of sites {self.file} cannot be read",
                got=f"{type(error).__name__}: {error}",
                remedy="restore it, or move it away: nodes then go by their numbers",
            ) from error

    def add(self, node_id: str, site: str, fingerprint: str) -> None:
        """Note a site; one of that node is replaced.

        Raises:
            StoreError: The file cannot be read or written.
        """
        from .array_files import write_atomically

        found = self.by_node()
        found[node_id] = ApprovedSite(node_id, site, fingerprint, datetime.now(UTC).isoformat(timespec="seconds"))
        text = json.dumps({"sites": [asdict(entry) for entry in found.values()]}, indent=1)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, text.encode())
        except OSError as error:
            raise StoreError(
                f"the list of sites {self.file} cannot be written",
                got=error.strerror,
                remedy="set GIVA_HOME to a folder of yours",
            ) from error


def fingerprint(public_key: Path) -> str:
    """`SHA256:...` of an OpenSSH public key, as `ssh-keygen -lf` prints it.

    Raises:
        ConfigError: The file is no such key.
    """
    try:
        blob = base64.b64decode(public_key.read_text(encoding="ascii").split()[1], validate=True)
    except (OSError, UnicodeDecodeError, IndexError, binascii.Error) as error:
        raise ConfigError(f"{public_key} is no public key", got=f"{type(error).__name__}: {error}") from error
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
