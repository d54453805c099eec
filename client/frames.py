"""Frames on the pipe between a worker and the process that works for it: a letter, a length, the content."""

from __future__ import annotations

import struct
from typing import BinaryIO

QUESTION, ANSWER, REFUSAL, PROGRESS = b"Q", b"A", b"X", b"P"

_HEADER = struct.Struct("<cQ")


def write_frame(stream: BinaryIO, kind: bytes, content: bytes) -> None:
    """Write one frame."""
    stream.write(_HEADER.pack(kind, len(content)))
    stream.write(content)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[bytes, bytes]:
    """Read one frame; raises EOFError where the other side is gone."""
    kind, length = _HEADER.unpack(_read(stream, _HEADER.size))
    return kind, _read(stream, length)


def _read(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content
