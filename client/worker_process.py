"""The process that holds model and rows: one request at a time in, its reply out, over the two ends of a pipe.

It is started and killed by the worker (`worker_tasks.py`), inherits no socket, and ends with the worker.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .frames import ANSWER, PROGRESS, REFUSAL, read_frame, write_frame

if TYPE_CHECKING:
    from .site_file import SiteFile

_PROGRESS_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1

log = logging.getLogger("giva.worker")


def main(site_file: str) -> None:
    """Answer requests until the worker closes the pipe."""
    _end_with(os.getppid())
    questions, replies = _private_pipes()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")

    from . import service  # noqa: F401  torch: seconds that the first request need not wait for
    from .site_file import SiteFile

    site = SiteFile.read(site_file)

    def tell(progress: dict[str, int]) -> None:
        write_frame(replies, PROGRESS, json.dumps(progress).encode())

    with suppress(EOFError):
        # neither request nor reply has a name here: with one, it would stay while the next task is worked on
        while True:
            write_frame(replies, *work(site, read_frame(questions)[1], tell))


def work(site: SiteFile, request: bytes, tell: Callable[[dict[str, int]], None]) -> tuple[bytes, bytes]:
    """The frame that answers a serialised request; a failure becomes its public reason."""
    from giva_core import protocol
    from giva_core.config import RunConfig
    from giva_core.errors import public_reason
    from giva_core.paths import giva_home

    from . import backbone, service
    from .questions import Questions
    from .wire import codec
    from .wire import worker_pb2 as pb

    kind, outcome = "request", ANSWER
    told = 0.0

    def on_step(step: int, steps: int) -> None:
        nonlocal told
        if step in (1, steps) or time.monotonic() - told >= _PROGRESS_SECONDS:
            told = time.monotonic()
            tell({"step": step, "steps": steps, "loads": backbone.model_loads()})

    try:
        message = codec.parse_request(request)
        del request  # as large as what is parsed from it, and as the arrays in that: the work needs one of the three
        kind, run_id, run = message.kind, message.run, RunConfig.from_json(message.config)
        if kind != protocol.FINISH:
            site.policy.check_hours(datetime.now())  # it may have waited in the queue since it was checked
        payload = codec.from_wire(message.payload)
        del message
        answer = service.answer(
            kind,
            payload,
            site.settings(run),
            site.local_config(run),
            questions=Questions(giva_home() / "questions", run_id),
            on_step=on_step,
        )
        del payload
        reply = pb.Reply(protocol=codec.WIRE_VERSION)
        codec.add_payload(reply.payload, answer)
        del answer
    except Exception as error:  # whatever it is, its text stays here: it may name files and quote rows
        reason = public_reason(error)
        log.error("%s failed: %s", kind, reason)
        if os.environ.get("GIVA_DEBUG") == "1":
            traceback.print_exception(error, file=sys.stderr)
        outcome, reply = REFUSAL, codec.refusal(reason)
    tell({"step": 0, "steps": 0, "loads": backbone.model_loads()})
    return outcome, reply.SerializeToString()


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take the pipes off stdin and stdout, so that nothing a library prints gets between the frames."""
    questions, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return questions, replies


def _end_with(parent: int) -> None:
    """Be killed when the worker dies, also in the middle of a task."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
