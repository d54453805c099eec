"""Programs that are kept running; stand-ins write down what they saw."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from live_worker import site_toml

from client.supervise import Program, site_programs, supervise
from giva_core.errors import ConfigError


def program(name: str, code: str) -> Program:
    return Program(name, (sys.executable, "-c", code), dict(os.environ))


def run(programs: list[Program], stop: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=supervise, args=(programs, stop, 0.01))
    thread.start()
    return thread


def test_what_ends_is_started_again_and_all_stop_together(tmp_path: Path) -> None:
    for name in ("starts", "stops"):
        os.mkfifo(tmp_path / name)
    failing = program("failing", f"open({str(tmp_path / 'starts')!r}, 'w').write('x'); raise SystemExit(3)")
    lasting = program(
        "lasting",
        "import signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'stops')!r}, 'w').write('bye'), sys.exit()))\n"
        f"open({str(tmp_path / 'starts')!r}, 'w').write('y')\n"
        "signal.pause()",
    )
    stop = threading.Event()
    thread = run([failing, lasting, Program("none", ("/no/such/program",), {})], stop)
    seen = ""
    while seen.count("x") < 3 or "y" not in seen:
        seen += (tmp_path / "starts").read_text()
    stop.set()
    assert (tmp_path / "stops").read_text() == "bye"
    reader = os.open(tmp_path / "starts", os.O_RDONLY | os.O_NONBLOCK)  # one that is just starting may write and end
    thread.join(60)
    os.close(reader)
    assert not thread.is_alive() and seen.count("y") == 1


def test_the_two_programs_of_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVA_SECRET", "x")
    monkeypatch.setenv("FLWR_HOME", "/var/flwr")
    path = tmp_path / "site.toml"
    tables = {"superlink": {"address": "link:8000", "root_certificates": "ca.crt", "key": "site.key"}}
    path.write_text(site_toml("a", tmp_path, tmp_path, worker={"socket": "/run/a b/w.sock"}, **tables))
    worker, node = site_programs(path)
    assert worker.command[1:] == ("-P", "-m", "client.worker", str(path)) and worker.environment["GIVA_SECRET"] == "x"
    arguments = list(node.command[node.command.index("--") + 1 :])
    assert arguments[0].endswith("flower-supernode")
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert 1024 < int(options.pop("--port")) < 65536
    assert options == {
        "--host": "127.0.0.1",
        "--superlink": "link:8000",
        "--root-certificates": str(tmp_path / "ca.crt"),
        "--auth-supernode-private-key": str(tmp_path / "site.key"),
        "--node-config": 'worker="/run/a b/w.sock"',
    }
    assert "GIVA_SECRET" not in node.environment and node.environment["FLWR_HOME"] == "/var/flwr"
    assert node.environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert json.dumps(sorted(node.environment)).count("GIVA") == 0


def test_without_tls_only_where_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "site.toml"
    path.write_text(site_toml("a", tmp_path, tmp_path, superlink={"address": "link:8000", "insecure": True}))
    assert "--insecure" in site_programs(path)[1].command
    assert "reads and changes all" in caplog.text


def test_a_site_says_where_to_connect_to(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(site_toml("a", tmp_path, tmp_path))
    with pytest.raises(ConfigError, match=r"superlink\.address"):
        site_programs(tmp_path / "site.toml")
