"""Health check of a container: exit code 0 if what is named answers, else 1. Needs nothing but Python.

health.py https://localhost:8000/health [CA.crt]     an HTTP server says 200
health.py 127.0.0.1:9098                             a TCP port is open
health.py /run/giva/worker.sock                      a Unix socket is open
"""

from __future__ import annotations

import socket
import ssl
import sys
from urllib.request import urlopen

TIMEOUT_SECONDS = 5.0


def check(target: str, authority: str | None = None) -> None:
    """Raise OSError unless `target` answers; certificates are verified against the file `authority`."""
    if target.startswith(("http://", "https://")):
        context = ssl.create_default_context(cafile=authority) if target.startswith("https") else None
        urlopen(target, timeout=TIMEOUT_SECONDS, context=context).close()  # raises for every status but 2xx
    elif target.startswith("/"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_SECONDS)
            connection.connect(target)
    else:
        host, _, port = target.rpartition(":")
        socket.create_connection((host, int(port)), TIMEOUT_SECONDS).close()


if __name__ == "__main__":
    try:
        check(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[1]} does not answer: {error}")
