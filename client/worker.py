"""The worker of a site: answers its messenger over a Unix socket, and lets a process of its own do the work.

    python -m client.worker SITE.toml        the same as `giva site worker SITE.toml`

The site's own code, never what came with a run. It leaves the network before it does anything else, and imports what
starts threads only then; neither torch nor Flower is among that.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

from giva_core.errors import GivaError

from .isolation import leave_network
from .needs import require_training
from .site_file import SiteFile

_PACKAGES = Path(__file__).resolve().parents[1]

log = logging.getLogger("giva.worker")


def run(site_file: str | Path) -> int:
    """Work until SIGTERM or SIGINT; what is in work then is not finished.

    Returns:
        The exit code, 0.

    Raises:
        GivaError: The site file cannot be used, or the worker cannot leave the network, listen or write.
    """
    path = Path(site_file).resolve()
    site = SiteFile.read(path)
    network = leave_network() if site.worker.network == "none" else "not kept from it: worker.network = host"
    cache = Path(site.worker.cache)
    require_training()

    from .servicer import Servicer, listen
    from .worker_tasks import Limits, TaskRunner

    cache.mkdir(mode=0o750, parents=True, exist_ok=True)
    limits = Limits(site.worker.task_seconds, int(site.worker.memory_gib * 2**30), site.worker.queue)
    runner = TaskRunner(path, limits, _child_environment(cache, site.policy.allow_model_hub))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    address = Path(site.worker.socket)
    server = listen(Servicer(site, runner, network), address, site.worker.queue, site.worker.message_mib)
    runner.start()
    log.info("site %s works at %s; network: %s", site.name, address, network)
    while not stop.wait(0.5):
        pass  # a signal may reach another thread, and this one is not woken then
    address.unlink(missing_ok=True)
    runner.stop()
    server.stop(grace=None).wait()
    log.info("stopped")
    return 0


def _child_environment(cache: Path, is_hub_allowed: bool) -> dict[str, str]:
    """The environment of the process that works: this one's, with the site's cache, and the same code as here."""
    own = {"GIVA_HOME": str(cache), "PYTHONPATH": str(_PACKAGES), "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **own, **({} if is_hub_allowed else {"HF_HUB_OFFLINE": "1"})}


def configure_log() -> None:
    """Log to stderr: what was asked, by kind and run, and how it ended; nothing of content."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("grpc").setLevel(logging.CRITICAL)  # it would write down what strangers send


if __name__ == "__main__":
    configure_log()
    try:
        sys.exit(run(sys.argv[1]))
    except GivaError as error:
        sys.exit(f"Error: {error}")
