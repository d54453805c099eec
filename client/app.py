"""The Flower ClientApp: every message is passed on, to the site's worker or, in a simulation, to this process.

At a deployed site this code came with the run. It needs Flower alone, and holds neither data nor model.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from .site import is_simulated

log = logging.getLogger("giva.client")
app = ClientApp()


@app.query("hello")
@app.query("state")
@app.train("calibrate")
@app.train("bases")
@app.train("head")
@app.train("round")
@app.evaluate("round")
@app.query("finish")
def handle(message: Message, context: Context) -> Message:
    """Answer a message of any kind; never raises."""
    if is_simulated(context.node_config):
        return _answer_here(message, context)
    from .messenger import pass_on

    reply = pass_on(message, context)
    if reply.has_error():
        log.error("%s failed: %s", message.metadata.message_type, reply.error.reason)
    return reply


def _answer_here(message: Message, context: Context) -> Message:
    """A simulated site's answer; its whole error shows on stderr where `GIVA_DEBUG=1`, its reason travels."""
    from giva_core import protocol
    from giva_core.config import RunConfig
    from giva_core.errors import GivaError, public_reason

    from .messenger import SITE_ERROR
    from .needs import require_training
    from .records import from_content, to_content
    from .site import site_settings

    kind = message.metadata.message_type
    try:
        require_training()
        from . import service

        config = RunConfig.from_flat(context.run_config)
        site = site_settings(config, context.node_config)
        answer = service.answer(kind, from_content(message.content), site, config)
        if kind == protocol.FINISH:
            service.let_go()
        return Message(to_content(answer), reply_to=message)
    except Exception as error:  # whatever it is, it must not reach the network with its text
        reason = public_reason(error)
        log.error("%s failed: %s", kind, reason)
        if isinstance(error, GivaError):  # who simulates is whose data these are: what, got, expected, remedy
            print(error, file=sys.stderr)
        if os.environ.get("GIVA_DEBUG") == "1":
            traceback.print_exception(error, file=sys.stderr)
        return Message(Error(SITE_ERROR, reason), reply_to=message)
