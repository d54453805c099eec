"""A round on real processes: what it takes beyond the sites' own work, and where that goes.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 10 --json

One SuperLink with TLS and node keys, a server and three sites, each a worker and a messenger, all on this machine; the
real encoder, two local steps of eight questions a round, so that little but overhead is left. The mark beside it is the
same federation with SuperNodes as Flower starts them: a fresh interpreter for every message, one look a second for a
new one. It needs `openssl` and `ssh-keygen`, and takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

# the processes are started as the tests start them
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "deploy"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from _medical import RECIPE, medical
from live_federation import BIN, LiveFederation, free_port, run_file

from giva_core.config import RunConfig

ROOT = Path(__file__).parents[1]
SITES = ("site-1", "site-2", "site-3")
EVAL_ROWS = 8
#: Flower's SuperNode looks for a message every 3 s (flwr 1.41, `start_client_internal.py`); of three that look
#: independently the last is 2.25 s late on average.
POLL_SECONDS = 3.0 * len(SITES) / (len(SITES) + 1)


_STARTS = """
import statistics, subprocess, time
def start():
    began = time.perf_counter()
    subprocess.run(["flwr-clientapp", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began
start()
print(statistics.median(start() for _ in range(5)))
"""


@dataclass(frozen=True)
class Measured:
    """One federation.

    Attributes:
        round_seconds: Median wall time of a training round.
        work_seconds: Median of the slowest site's local training in it.
        overhead_seconds: Median of the difference, round by round.
        start_seconds: Median wall time of starting one messenger process, alone on the machine.
        model_loads: Model loads by site over the whole run.
    """

    round_seconds: float
    work_seconds: float
    overhead_seconds: float
    start_seconds: float
    model_loads: dict[str, int]


def measure(folder: Path, model: Path, data: Path, rounds: int, *, is_plain: bool) -> Measured:
    """Run one federation; `is_plain` leaves the start of messengers to Flower."""
    live = LiveFederation(folder, model, data)
    try:
        live.make_certificates("--host", "localhost", *(part for site in SITES for part in ("--site", site)))
        live.start_superlink()
        live.start_server()
        live.giva("superlink", "add", "here", live.address, "--root-certificates", live.keys / "ca.crt")
        for site in SITES:
            live.giva("site", "approve", live.keys / f"{site}.pub", "--name", site)
            start_site(live, site, is_plain)
        live.wait_for_sites(*SITES)
        config = RunConfig.from_toml(
            RECIPE,
            {
                "model.path": str(model),
                "rounds.min-sites": len(SITES),
                "rounds.quorum": len(SITES),
                "rounds.head-rounds": 0,
                "rounds.num-rounds": rounds,
                "train.batch-size": EVAL_ROWS,
                "train.max-local-steps": 2,
            },
        )
        live.giva("run", "start", run_file(folder, config), "--stream")
        records = live.store.rounds(live.store.run("last").run_id, "train")
        work = [max(site.train_seconds for site in record.sites) for record in records]
        loads = {site: live.giva("site", "status", folder / site / "site.toml")["model_loads"] for site in SITES}
    finally:
        live.stop()
    return Measured(
        round_seconds=statistics.median(record.seconds for record in records),
        work_seconds=statistics.median(work),
        overhead_seconds=statistics.median(r.seconds - w for r, w in zip(records, work, strict=True)),
        start_seconds=start_seconds(is_plain),
        model_loads=loads,
    )


def start_site(live: LiveFederation, site: str, is_plain: bool) -> None:
    """A worker and its messenger."""
    if not is_plain:
        live.start_site_in_parts(site)
        return
    live.start(f"{site}-worker", sys.executable, "-m", "client.worker", live.site_file(site))
    live.start(
        f"{site}-messenger",
        *("flower-supernode", "--superlink", live.address, "--port", free_port()),
        *("--root-certificates", live.keys / "ca.crt", "--auth-supernode-private-key", live.keys / f"{site}.key"),
        *("--node-config", f'worker="{live.folder / site / "s"}"'),
        FLWR_HOME=str(live.folder / site / "flwr"),
    )


def start_seconds(is_plain: bool) -> float:
    """How long a messenger process takes to start."""
    timed = [sys.executable, "-c", _STARTS]
    prefork = [sys.executable, str(ROOT / "client" / "prefork.py"), "--"]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        timed if is_plain else [*prefork, *timed], check=True, capture_output=True, text=True, env=environment
    )
    return float(done.stdout.split()[-1])


def table(found: dict[str, Measured]) -> str:
    """For people."""
    names = list(found)
    lines = [f"{'seconds':<58} {names[0]:>10} {names[1]:>10}"]
    rows = {
        "a training round": [m.round_seconds for m in found.values()],
        "  the slowest site's local training": [m.work_seconds for m in found.values()],
        "  everything else": [m.overhead_seconds for m in found.values()],
        "    of it, SuperNodes' look for a message (expected)": [POLL_SECONDS] * 2,
        "    of it, start of a messenger process, one alone": [m.start_seconds for m in found.values()],
    }
    lines += [f"{label:<58} {values[0]:>10.2f} {values[1]:>10.2f}" for label, values in rows.items()]
    loads = [max(m.model_loads.values()) for m in found.values()]
    return "\n".join([*lines, f"{'model loads, most of a site':<58} {loads[0]:>10} {loads[1]:>10}"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="training rounds of each federation")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    options = parser.parse_args()
    made = medical()
    found = {}
    for name, is_plain in (("preforked", False), ("plain", True)):
        with tempfile.TemporaryDirectory(prefix="giva-") as scratch:
            data = Path(scratch) / "data"
            for site in SITES:
                shutil.copytree(Path(made.folder) / "sites" / site, data / site)
                rows = (data / site / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
                (data / site / "test.jsonl").write_text("".join(rows[:EVAL_ROWS]), encoding="utf-8")
            print(f"three sites, {name}", file=sys.stderr)
            model = Path(made.model)
            found[name] = measure(Path(scratch), model, data, options.rounds, is_plain=is_plain)
    print(json.dumps({name: asdict(m) for name, m in found.items()}) if options.json else table(found))


if __name__ == "__main__":
    main()
