"""The worker's side of the socket: what is asked is checked, queued, worked off and answered.

What the messenger passes on came over the network, and the messenger's own code did so, too. Every request is held
against the site file here, before anything is loaded or read, and again where the work is done.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import grpc

from giva_core import protocol
from giva_core.config import RunConfig
from giva_core.errors import ConfigError, GivaError, ProtocolError, public_reason

from .site_file import SiteFile
from .wire import codec, link
from .wire import worker_pb2 as pb
from .worker_tasks import Task, TaskRunner, queue_is_full

#: What a worker can be asked.
KINDS = frozenset(
    {
        protocol.HELLO,
        protocol.STATE,
        protocol.HEAD,
        protocol.CALIBRATE,
        protocol.BASES,
        protocol.ROUND,
        protocol.EVALUATE,
        protocol.FINISH,
    }
)

_SPARE_THREADS = 4  # for questions after the status, and for refusals
_RUN = re.compile(r"[0-9]{1,20}")

log = logging.getLogger("giva.worker")


def check_request(message: pb.Request, site: SiteFile, now: datetime) -> None:
    """Refuse what can be refused before a model is loaded or a row is read.

    Raises:
        GivaError: With a public reason, without content.
    """
    if message.kind not in KINDS:
        raise ProtocolError("unknown kind of message", got=repr(message.kind[:40]), public="unknown kind of message")
    if not _RUN.fullmatch(message.run):
        raise ProtocolError("that is no id of a run", got=repr(message.run[:40]), public="the run has no usable id")
    try:
        config = RunConfig.from_json(message.config)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            "the run's configuration cannot be read",
            got=type(error).__name__,
            public="the run's configuration cannot be read",
        ) from None
    site.policy.check_run(config)
    site.local_config(config)
    if message.kind != protocol.FINISH:
        site.policy.check_hours(now)


class Servicer:
    """The two methods of the service, bytes in and bytes out.

    Args:
        site: The site file.
        runner: Who works.
        network: How the worker is kept from the network, in words.
        now: The local time.
    """

    def __init__(
        self, site: SiteFile, runner: TaskRunner, network: str, now: Callable[[], datetime] = datetime.now
    ) -> None:
        self._site, self._runner, self._network, self._now = site, runner, network, now
        self._began = time.monotonic()
        # of the task in work and those that wait: a request takes one before it is parsed, which costs memory, too
        self._places = threading.BoundedSemaphore(site.worker.queue + 1)

    def ask(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer one request; every failure becomes a public reason."""
        if not self._places.acquire(blocking=False):
            self._runner.count_refused()
            return _refused("request", queue_is_full())
        try:
            return self._ask(request, context)
        finally:
            self._places.release()

    def _ask(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        kind, began = "request", time.monotonic()
        try:
            task = self._task(request, context)
            kind = task.kind
            answer = self._runner.submit(task)
        except Exception as error:  # whatever it is, it must not reach the network with its text
            self._runner.count_refused()
            return _refused(kind, error)
        try:
            reply = answer.result()
        except (GivaError, CancelledError) as error:
            return _refused(kind, error)
        log.info("%s of run %s took %.1f s", kind, task.run, time.monotonic() - began)
        return reply

    def _task(self, request: bytes, context: grpc.ServicerContext) -> Task:
        """The checked request as a task; what was parsed, as large as the request, does not wait with it."""
        message = codec.parse_request(request)
        check_request(message, self._site, self._now())
        server_round = codec.values_of(message.payload).get("server-round")
        round_ = server_round if type(server_round) is int else 0
        return Task(request, message.kind, message.run, round_, context.is_active)

    def status(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """What the worker is doing."""
        try:
            codec.parse_status_request(request)
        except ProtocolError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, public_reason(error))
        now, progress = time.monotonic(), self._runner.progress()
        task = progress.task
        return pb.StatusReply(
            protocol=codec.WIRE_VERSION,
            busy=task is not None,
            kind=task.kind if task else "",
            run=task.run if task else "",
            round=task.round if task else 0,
            step=progress.step,
            steps=progress.steps,
            seconds=now - progress.began if task else 0.0,
            waiting=self._runner.waiting,
            queue=self._site.worker.queue,
            done=progress.done,
            refused=progress.refused,
            killed=progress.killed,
            model_loads=progress.model_loads,
            up_seconds=now - self._began,
            memory_bytes=self._runner.memory_bytes(),
            network=self._network,
        ).SerializeToString()


def listen(servicer: Servicer, path: Path, queue: int, message_mib: int) -> grpc.Server:
    """Answer at a Unix socket that its owner and group may use.

    Raises:
        ConfigError: Another worker answers there, or the socket cannot be made.
    """
    _free(path)
    threads = queue + 1 + _SPARE_THREADS
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="worker"),
        options=link.server_options(message_mib << 20),
        maximum_concurrent_rpcs=2 * threads,
    )
    link.add_to_server(server, servicer.ask, servicer.status)
    before = os.umask(0o117)  # the socket is made with 0660
    try:
        server.add_insecure_port(link.address(path))
        server.start()
    except RuntimeError:
        raise ConfigError(
            f"the worker cannot listen at {path}",
            cause="the folder is not this user's, or the path is longer than a Unix socket's may be, about 100 letters",
            remedy="set worker.socket in the site file to a path in a folder that the worker may write to",
        ) from None
    finally:
        os.umask(before)
    return server


def _free(path: Path) -> None:
    """Make the folder, and take away the socket of a worker that is gone."""
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(str(path))
        raise ConfigError(
            f"another worker answers at {path}",
            remedy="stop it, or set worker.socket to another path",
        )
    if path.is_socket():
        path.unlink()


def _refused(kind: str, error: BaseException) -> bytes:
    reason = "busy: the worker is stopping" if isinstance(error, CancelledError) else public_reason(error)
    log.error("%s refused: %s", kind, reason)
    return codec.refusal(reason).SerializeToString()
