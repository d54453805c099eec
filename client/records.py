"""Payloads as Flower records and back, for sites that answer in Flower's own process."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from giva_core.protocol import Payload


def to_content(payload: Payload) -> RecordDict:
    """A payload as Flower records."""
    arrays = ArrayRecord({name: Array(array) for name, array in payload.arrays.items()})
    return RecordDict({"arrays": arrays, "values": ConfigRecord(dict(payload.values))})


def from_content(content: RecordDict) -> Payload:
    """The inverse of `to_content`."""
    arrays = {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}
    values = {name: value for record in content.config_records.values() for name, value in record.items()}
    return Payload(arrays, values)  # type: ignore[arg-type]
