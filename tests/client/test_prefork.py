"""Flower's command from a process that has imported it: the same output, exit code, folder, environment, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client import prefork

PREFORK = Path(prefork.__file__)

#: A stand-in for flwr with an entry point of its own: it tells what it sees.
_MODULE = """
import atexit, json, os, signal, sys, threading

print("imported", file=open(os.environ["SEEN"], "a"))
calls = 0

def main():
    global calls
    calls += 1
    atexit.register(print, "bye")
    match sys.argv[1:]:
        case ["tell"]:
            print(json.dumps([sys.argv, os.getcwd(), os.environ.get("WORD"), sys.stdin.read(), calls]))
            print("to stderr", file=sys.stderr)
        case ["exit", code]:
            sys.exit(int(code))
        case ["text"]:
            sys.exit("a text")
        case ["raise"]:
            raise ValueError("broken")
        case ["killed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["wait", path]:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
            open(path, "w").write(str(os.getpid()))
            signal.pause()
        case ["thread"]:
            threading.Timer(0.1, lambda: print("late", flush=True)).start()
"""

#: One whose main function leaves a thread behind.
_IDLE = """import atexit, json, os, signal, sys, threading

def stay():
    threading.Thread(target=threading.Event().wait).start()
    print(sys.argv[1:])
    sys.exit(7)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Where `flwr-clientapp` is the stand-in, for importlib.metadata and on PATH."""
    site = tmp_path / "site"
    info = site / "standin-1.dist-info"
    info.mkdir(parents=True)
    (site / "standin.py").write_text(_MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: standin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[console_scripts]\n{prefork.COMMAND} = standin:main\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    real = programs / prefork.COMMAND
    real.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import standin; standin.main()" "$@"\n')
    real.chmod(0o755)
    # flwr's own entry point of the same name must not be found beside it
    code = f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(site)!r}]"
    (tmp_path / "run.py").write_text(
        f"{code}\nimport importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('prefork', {str(PREFORK)!r})\n"
        "prefork = importlib.util.module_from_spec(spec); spec.loader.exec_module(prefork)\n"
        "prefork._ALSO = ()\n"
        "if __name__ == '__main__': sys.exit(prefork._command_line(sys.argv[1:]))\n"
    )
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(site),
        "SEEN": str(tmp_path / "seen"),
        "TMPDIR": str(tmp_path),
    }


def run(environment: dict[str, str], script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A shell script as the command behind the prefork server."""
    folder = Path(environment["SEEN"]).parent
    command = [sys.executable, str(folder / "run.py"), *options, "--", "sh", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_it_is_the_command_but_for_the_import(environment: dict[str, str], tmp_path: Path) -> None:
    script = "cd /; for word in one two; do echo in | WORD=$word flwr-clientapp tell; done; exit 5"
    done = run(environment, script)
    assert done.returncode == 5 and done.stderr.count("to stderr") == 2
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert answers == [[[prefork.COMMAND, "tell"], "/", word, "in\n", 1] for word in ("one", "two")]
    assert done.stdout.count("bye") == 2
    assert Path(environment["SEEN"]).read_text() == "imported\n"
    assert not list(tmp_path.glob("giva-*"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("exit 0", 0, ""),
        ("exit 3", 3, ""),
        ("text", 1, "a text"),
        ("raise", 1, "ValueError: broken"),
        ("killed", 137, ""),
    ],
)
def test_exit_codes(environment: dict[str, str], words: str, code: int, said: str) -> None:
    done = run(environment, f"flwr-clientapp {words}")
    assert done.returncode == code and said in done.stderr


def test_threads_are_waited_for(environment: dict[str, str]) -> None:
    assert "late" in run(environment, "flwr-clientapp thread").stdout


@pytest.mark.parametrize(("number", "code"), [("TERM", 42), ("KILL", 137)])
def test_signals_reach_it_and_nobody_is_left_where_nobody_waits(
    environment: dict[str, str], tmp_path: Path, number: str, code: int
) -> None:
    os.mkfifo(tmp_path / "pipe")
    script = (
        f"flwr-clientapp wait {tmp_path}/pipe & read pid <{tmp_path}/pipe; kill -{number} $!; wait $!; echo $? $pid"
    )
    [(found, pid)] = re.findall(r"^(\d+) (\d+)$", run(environment, script).stdout, re.MULTILINE)
    assert int(found) == code
    subprocess.run(["tail", f"--pid={pid}", "-f", "/dev/null"], check=True, timeout=60)


def test_without_the_server_the_real_command_runs(environment: dict[str, str], tmp_path: Path) -> None:
    gone = {
        **environment,
        "GIVA_PREFORK": str(tmp_path / "none"),
        "GIVA_PREFORK_REAL": shutil.which(prefork.COMMAND, path=environment["PATH"]),
    }
    folder = prefork.write_program(tmp_path / "own")
    done = subprocess.run(
        [str(folder / prefork.COMMAND), "exit", "9"],
        env=gone,
        capture_output=True,
        text=True,
        check=False,  # type: ignore[arg-type]
    )
    assert done.returncode == 9


def test_the_small_program_may_be_written_beforehand(environment: dict[str, str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    subprocess.run([sys.executable, str(PREFORK), "--write", str(own)], check=True)
    done = run(environment, "command -v flwr-clientapp; flwr-clientapp exit 4", "--use", str(own))
    assert done.returncode == 4 and done.stdout.splitlines()[0] == str(own / prefork.COMMAND)
    (own / prefork.COMMAND).chmod(0o644)
    done = run(environment, "flwr-clientapp exit 4", "--use", str(own))
    assert done.returncode == 4 and "every message starts flwr-clientapp anew" in done.stderr


def test_usage() -> None:
    for arguments in ([], ["--"], ["flower-supernode"]):
        with pytest.raises(SystemExit, match="usage"):
            prefork._command_line(arguments)


def test_flower_s_own_command_starts_without_threads() -> None:
    """What this relies on: the entry point's name, and that importing it starts nothing."""
    code = "import os, prefork; prefork._preload(); print(len(os.listdir('/proc/self/task')))"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PREFORK.parent, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"


def test_a_command_of_flower_s_ends_with_its_main_function(environment: dict[str, str], tmp_path: Path) -> None:
    """Whatever threads it leaves; as an entry point beside Flower's command it is known to end so."""
    module = tmp_path / "site" / "standin.py"
    module.write_text(_MODULE.replace("import atexit, json, os, signal, sys, threading", _IDLE))
    with (tmp_path / "site" / "standin-1.dist-info" / "entry_points.txt").open("a") as points:
        points.write("flower-standin = standin:stay\n")
    program = Path(shutil.which(prefork.COMMAND, path=environment["PATH"]) or "").with_name("flower-standin")
    program.write_text("#!/bin/sh\nexit 99\n")
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, PREFORK, "--", "flower-standin", "--a", "b"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (7, "['--a', 'b']\n")
