"""Start Flower's `flwr-clientapp` in milliseconds: a process that has imported it already forks one for each message.

    python prefork.py -- flower-supernode --superlink ...

Flower starts a fresh `flwr-clientapp`, found through PATH, for every message, and importing flwr takes seconds of
processor time. Here the command behind `--` runs with a folder first on its PATH in which `flwr-clientapp` is a small
program. It hands its arguments, folder, environment and standard streams to this process, which forks: the child is
what the real command would have become, with the same streams, and the small program ends with its exit code. Code of
an app is imported in the child alone, so every message still finds it fresh. Where this process is gone, the real
command is started.

Relied on is the name of the command alone, and that it is an entry point. This file needs nothing but Python and flwr,
so that a machine without this project can run it, too. It ends with the command, with its exit code.

A command that is itself an entry point beside `flwr-clientapp`, as `flower-supernode` is, ends when its main function
does: flwr 1.41's would else stay, idle for good, where its connection has failed for good, since a thread of its API
server goes on; and what does not end is not started again.

Where nothing in the temporary folder may be executed, as in many containers, the small program is written beforehand:
`prefork.py --write FOLDER`, and later `prefork.py --use FOLDER -- flower-supernode ...`.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NoReturn

COMMAND = "flwr-clientapp"
LENGTH = struct.Struct("<I")
_ALSO = ("grpc", "numpy", "flwr.clientapp")  # what the app imports, and what Flower imports when it loads an app
_STREAMS = 3
_READ_SECONDS = 10.0
_LEAVE_SECONDS = 5.0
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1

#: The small program, started as `python -I -S`: it waits for the real one's exit code, and passes signals on.
_PROGRAM = """\
import array, json, os, signal, socket, struct, sys

def hand_over():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["GIVA_PREFORK"])
    wish = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    connection.sendmsg(
        [struct.pack("<I", len(wish))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    )
    connection.sendall(wish)
    return connection

try:
    connection = hand_over()
except OSError:
    real = os.environ["GIVA_PREFORK_REAL"]
    os.execv(real, [real, *sys.argv[1:]])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: connection.send(bytes([number])))
answer = b""
while len(answer) < 4:
    part = connection.recv(4 - len(answer))
    if not part:
        sys.exit(1)
    answer += part
sys.exit(struct.unpack("<i", answer)[0])
"""


class _Child(Exception):
    """Raised in a forked process to unwind to `main`, which becomes the command."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments


def main(arguments: list[str], programs: Path | None = None) -> int:
    """Run the command in `arguments`; returns its exit code, 128 + n where signal n ended it.

    Args:
        arguments: The command.
        programs: The folder with the small program; without, it is written into a temporary one.
    """
    real = shutil.which(COMMAND)
    if real is None:
        sys.exit(f"Error: there is no {COMMAND} on PATH; install flwr")
    # numpy's threads would not survive a fork, and a messenger computes nothing
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="giva-"))
    try:
        code = _run(arguments, folder, programs or write_program(folder / "bin"), real)
    except _Child as child:
        of_child = child.arguments  # in a fork: the folder is not its own to remove
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return code
    _become(of_child)


def _run(arguments: list[str], folder: Path, programs: Path, real: str) -> int:
    address = folder / "prefork.sock"
    own = {
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "GIVA_PREFORK": str(address),
        "GIVA_PREFORK_REAL": real,
    }
    if not os.access(programs / COMMAND, os.X_OK):
        print(f"nothing in {programs} may be executed: every message starts {COMMAND} anew", file=sys.stderr)
        own = {}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)  # before the command is started: what comes during the import waits
    command = subprocess.Popen(_ending(arguments, real), env={**os.environ, **own}, preexec_fn=_end_with_parent)
    for number in _PASSED_ON:
        signal.signal(number, lambda number, frame: command.send_signal(number))
    _preload()
    return _serve(listener, command)


def _ending(arguments: list[str], real: str) -> list[str]:
    """The command, so that it ends with its main function where that is known."""
    found = shutil.which(arguments[0])
    if found is None or Path(found).parent != Path(real).parent or not _entry_point(Path(found).name):
        return arguments
    return [sys.executable, str(Path(__file__).resolve()), "--run", found, *arguments[1:]]


def _entry_point(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def _end_with_parent() -> None:
    """Let the command be stopped where this process is killed: a second one of its kind may be started then."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def write_program(folder: Path) -> Path:
    """Write the small program; returns the folder, for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "hand_over.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    # through a shell, since the line of an interpreter has neither spaces in its path nor more than one argument
    starter = folder / COMMAND
    starter.write_text(
        f'#!/bin/sh\nexec {_quoted(sys.executable)} -I -S {_quoted(str(program))} "$@"\n', encoding="utf-8"
    )
    starter.chmod(0o755)
    return folder


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _preload() -> None:
    """Import what every message needs, and use nothing of it: threads would not survive a fork."""
    found = _entry_point(COMMAND)
    if found:
        found.load()
    for name in _ALSO:
        __import__(name)
    gc.collect()
    gc.freeze()  # a child that looks for garbage would copy every page


def _serve(listener: socket.socket, command: subprocess.Popen[bytes]) -> int:
    """Fork for every connection until the command ends."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while (code := command.poll()) is None:
        ready, _, _ = select.select([listener.fileno(), woken], [], [], 5.0)
        if woken in ready:
            os.read(woken, 4096)
            _reap(command.pid)
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.set_wakeup_fd(-1)
                listener.close()
                for end in (woken, wake):
                    os.close(end)
                _attend(connection)
            connection.close()
    return 128 - code if code < 0 else code


def _reap(command: int) -> None:
    """Collect attendants that have ended, and orphans where this is a container's first process."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == command:
            return  # the command is collected by its own object
        os.waitpid(found.si_pid, 0)


def _attend(connection: socket.socket) -> None:
    """In a fork: start the command, tell its exit code, pass on signals; kill it where nobody waits any more."""
    for number in (*_PASSED_ON, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    try:
        connection.settimeout(_READ_SECONDS)
        (arguments, folder, environment), streams = _read_wish(connection)
    except (OSError, ValueError):
        os._exit(1)
    ended, alive = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ended)  # `alive` closes when this process ends, which is how the attendant hears of it
        connection.close()
        _take_on(folder, environment, streams)
        raise _Child(arguments)
    os.close(alive)
    for stream in streams:
        os.close(stream)
    is_wanted = True
    while True:
        ready, _, _ = select.select([ended, connection.fileno()] if is_wanted else [ended], [], [])
        if ended in ready:
            break
        try:
            numbers = connection.recv(16)
        except OSError:
            numbers = b""
        is_wanted = bool(numbers)
        for wanted in numbers or bytes([signal.SIGTERM]):
            os.kill(child, wanted)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(OSError):
        connection.sendall(struct.pack("<i", 128 - code if code < 0 else code))
    os._exit(0)


def _read_wish(connection: socket.socket) -> tuple[tuple[list[str], str, Mapping[str, str]], list[int]]:
    size = socket.CMSG_SPACE(_STREAMS * array.array("i").itemsize)
    head, extras, _, _ = connection.recvmsg(LENGTH.size, size)
    streams = array.array("i")
    for level, kind, content in extras:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            streams.frombytes(content[: len(content) - len(content) % streams.itemsize])
    if len(head) < LENGTH.size or len(streams) != _STREAMS:
        raise ValueError
    (length,) = LENGTH.unpack(head)
    content = b""
    while len(content) < length:
        part = connection.recv(length - len(content))
        if not part:
            raise ValueError
        content += part
    arguments, folder, environment = json.loads(content)
    return (arguments, folder, environment), list(streams)


def _take_on(folder: str, environment: Mapping[str, str], streams: list[int]) -> None:
    """Be where, with what and to whom the small program was started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def _become(arguments: list[str]) -> NoReturn:
    code = _call([COMMAND, *arguments])
    threading._shutdown()  # type: ignore[attr-defined]
    _end(code)


def _run_whole(arguments: list[str]) -> NoReturn:
    """In a process of its own: the command, and no thread that outlives its main function by more than some seconds."""
    code = _call(arguments)
    give_up = time.monotonic() + _LEAVE_SECONDS
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, give_up - time.monotonic()))
    _end(code)


def _call(arguments: list[str]) -> int:
    """Call the entry point that the command is; returns its exit code."""
    sys.argv = arguments
    found = _entry_point(Path(arguments[0]).name)
    if found is None:
        print(f"Error: there is no command {arguments[0]}", file=sys.stderr)
        return 127
    command: Any = found.load()
    try:
        code = command()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    return int(code or 0) & 0xFF


def _end(code: int) -> NoReturn:
    """End as Python does, but for the taking apart of all modules: that costs more than most messages do."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _command_line(arguments: list[str]) -> int:
    match arguments:
        case ["--run", *command] if command:
            _run_whole(command)
        case ["--write", folder]:
            write_program(Path(folder).resolve())
            return 0
        case ["--use", folder, "--", *command] if command:
            return main(command, Path(folder).resolve())
        case ["--", *command] if command:
            return main(command)
    sys.exit("usage: prefork.py [--use FOLDER] -- COMMAND [ARGUMENT ...]\n       prefork.py --write FOLDER")


if __name__ == "__main__":
    sys.exit(_command_line(sys.argv[1:]))
