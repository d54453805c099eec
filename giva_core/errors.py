"""Errors that tell what happened, what was expected, the likely cause and the remedy.

Every error raised for bad input is a `GivaError`. Its text is for the machine it is raised on and may name local
files. Only `public` may travel: a site answers the server with `public_reason(error)`, which never carries text,
labels, paths or per-example values.
"""

from __future__ import annotations


class GivaError(Exception):
    """Base of all errors of this project.

    Args:
        what: What went wrong, one clause.
        got: What was found.
        expected: What was needed.
        cause: The probable cause.
        remedy: What to do about it.
        public: A sentence that may leave the site: no text, label, path or per-example value in it. Without it only
            the kind of the error leaves.
    """

    kind = "error"
    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        cause: str | None = None,
        remedy: str | None = None,
        public: str | None = None,
    ) -> None:
        self.what, self.got, self.expected = what, got, expected
        self.cause, self.remedy, self.public = cause, remedy, public
        super().__init__(self._text())

    def _text(self) -> str:
        parts = [self.what.rstrip(".")]
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        text = "; ".join(parts) + "."
        if self.cause:
            text += f" Probable cause: {self.cause.rstrip('.')}."
        if self.remedy:
            text += f" Remedy: {self.remedy.rstrip('.')}."
        return text


class ConfigError(GivaError):
    """A setting is unknown, of the wrong type or out of range."""

    kind = "config"
    exit_code = 2


class DataError(GivaError):
    """A site's data cannot be used."""

    kind = "data"


class TargetError(GivaError):
    """The layers named as targets cannot be adapted."""

    kind = "target"


class BasesError(GivaError):
    """Sketches or bases are missing, malformed, or of another federation."""

    kind = "bases"


class ProtocolError(GivaError):
    """A message does not have the agreed form."""

    kind = "protocol"


class UpdateError(GivaError):
    """A site's update does not qualify for aggregation."""

    kind = "update"


class QuorumError(GivaError):
    """Too few sites took part in a phase."""

    kind = "quorum"


class CheckpointError(GivaError):
    """A checkpoint is missing, corrupt, or of another run."""

    kind = "checkpoint"


class StoreError(GivaError):
    """The run store cannot be read or written."""

    kind = "store"


class NumericsError(GivaError):
    """A computation left the finite numbers."""

    kind = "numerics"


class DependencyError(GivaError):
    """An optional dependency is missing."""

    kind = "dependency"


def public_reason(error: BaseException) -> str:
    """The part of `error` that may leave a site: its kind and, if the raiser cleared one, its public sentence."""
    if isinstance(error, GivaError):
        return f"{error.kind}: {error.public}" if error.public else error.kind
    return f"internal: {type(error).__name__}"
