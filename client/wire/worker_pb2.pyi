from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Array(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("name", "text", "integer", "number", "flag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    text: str
    integer: int
    number: float
    flag: bool
    def __init__(self, name: _Optional[str] = ..., text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., flag: bool = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("arrays", "values")
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    arrays: _containers.RepeatedCompositeFieldContainer[Array]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, arrays: _Optional[_Iterable[_Union[Array, _Mapping]]] = ..., values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("protocol", "kind", "run", "config", "payload")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    kind: str
    run: str
    config: str
    payload: Payload
    def __init__(self, protocol: _Optional[int] = ..., kind: _Optional[str] = ..., run: _Optional[str] = ..., config: _Optional[str] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("protocol", "payload", "reason")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    payload: Payload
    reason: str
    def __init__(self, protocol: _Optional[int] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    def __init__(self, protocol: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("protocol", "busy", "kind", "run", "round", "step", "steps", "seconds", "waiting", "queue", "done", "refused", "killed", "model_loads", "up_seconds", "memory_bytes", "network")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    KILLED_FIELD_NUMBER: _ClassVar[int]
    MODEL_LOADS_FIELD_NUMBER: _ClassVar[int]
    UP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    busy: bool
    kind: str
    run: str
    round: int
    step: int
    steps: int
    seconds: float
    waiting: int
    queue: int
    done: int
    refused: int
    killed: int
    model_loads: int
    up_seconds: float
    memory_bytes: int
    network: str
    def __init__(self, protocol: _Optional[int] = ..., busy: bool = ..., kind: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., seconds: _Optional[float] = ..., waiting: _Optional[int] = ..., queue: _Optional[int] = ..., done: _Optional[int] = ..., refused: _Optional[int] = ..., killed: _Optional[int] = ..., model_loads: _Optional[int] = ..., up_seconds: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., network: _Optional[str] = ...) -> None: ...
