"""The messenger: a Flower message becomes a request to the site's worker, and its reply a Flower message.

It came over the network with the run, so it is given nothing: no data, no model, no device. Arrays are passed on as the
bytes they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from giva_core.errors import ConfigError, ProtocolError, public_reason
from giva_core.protocol import Value

from .wire import worker_pb2 as pb
from .wire.codec import add_value, values_of
from .wire.link import Link, WorkerAbsentError

#: Flower reserves the codes below 100.
SITE_ERROR = 100

#: How long a worker may be away: it may be restarting.
PATIENCE_SECONDS = 10.0

_NUMPY = "numpy.ndarray"  # Flower's name for arrays in numpy's file format


def pass_on(message: Message, context: Context, patience_seconds: float = PATIENCE_SECONDS) -> Message:
    """Let the site's worker answer; a failure becomes an error reply without content."""
    try:
        request = to_request(message, context)
        with Link(_socket(context.node_config), patience_seconds) as link:
            reply = link.ask(request, timeout_seconds=message.metadata.ttl)
        if reply.WhichOneof("outcome") == "payload":
            return Message(to_content(reply.payload), reply_to=message)
        reason = reply.reason or "the site's worker gave no answer"
    except WorkerAbsentError as error:
        reason = str(error.public)
    except Exception as error:  # whatever it is, it must not reach the network with its text
        reason = public_reason(error)
    return Message(Error(SITE_ERROR, reason), reply_to=message)


def to_request(message: Message, context: Context) -> pb.Request:
    """A Flower message as a request."""
    content = message.content
    request = pb.Request(
        kind=message.metadata.message_type, run=str(context.run_id), config=json.dumps(dict(context.run_config))
    )
    payload = request.payload  # protobuf would copy one that is made elsewhere
    for arrays in content.array_records.values():
        for name, array in arrays.items():
            payload.arrays.append(_to_wire(name, array))
    for values in content.config_records.values():
        for name, value in values.items():
            add_value(payload, name, cast(Value, value))
    return request


def to_content(payload: pb.Payload) -> RecordDict:
    """A reply's payload as Flower records."""
    arrays = ArrayRecord({array.name: _from_wire(array) for array in payload.arrays})
    return RecordDict({"arrays": arrays, "values": ConfigRecord(cast(Any, values_of(payload)))})


def _socket(node_config: Mapping[str, Any]) -> str:
    """The worker's socket, the one thing that the node's configuration says."""
    if "worker" not in node_config:
        raise ConfigError("the node does not say where its worker is", public="the node's configuration has no worker")
    if others := sorted(set(node_config) - {"worker", "partition-id", "num-partitions"}):
        raise ConfigError(
            "the node's configuration says more than where its worker is",
            got=", ".join(others),
            remedy="move these settings to the site file of the worker",
            public="the node's configuration has other keys than worker",
        )
    return str(node_config["worker"])


def _to_wire(name: str, array: Array) -> pb.Array:
    """An array's bytes behind numpy's header, which are what travels."""
    if array.stype != _NUMPY:
        raise ProtocolError("an array has an unknown form", got=array.stype, public="an array has an unknown form")
    stream = BytesIO(array.data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if is_fortran and len(shape) > 1:
        own = np.ascontiguousarray(array.numpy())
        return pb.Array(name=name, dtype=dtype.str, shape=shape, data=own.tobytes())
    return pb.Array(name=name, dtype=dtype.str, shape=shape, data=stream.read())


def _from_wire(array: pb.Array) -> Array:
    """The inverse of `_to_wire`."""
    dtype, shape = np.dtype(array.dtype), tuple(array.shape)
    stream = BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    stream.write(array.data)
    return Array(str(dtype), shape, _NUMPY, stream.getvalue())
