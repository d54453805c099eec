"""The in-process engine: set-up time, overhead of a round, bytes, and memory from 4 to 100 sites.

    python benchmarks/engine.py
    python benchmarks/engine.py --json

The same medical questions are dealt out evenly to 4 and to 100 sites. Every simulation is a process of its own, since
only a fresh process tells its peak memory; the mark beside it is one site that holds all rows and trains without
messages, as `giva train` does. The time inside the sites' methods (reading, sketching, building bases, training,
evaluating) is taken apart from the wall time, so that what remains is the engine's: messages, checks, sums, the store.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from _medical import RECIPE, medical

from giva_core.config import RunConfig, parse_assignments
from giva_core.types import RoundRecord
from server.cli.result import bytes_text

FEW, MANY = 4, 100
EVAL_ROWS = 200
#: Times and bytes: the recipe's calibration and short rounds.
TIMED = {"rounds.head-rounds": 1, "rounds.num-rounds": 3, "train.max-local-steps": 2}
#: Memory: one round, in which all sites train on all rows, so that 4 and 100 of them meet the same longest batch.
LEAN = {
    "rounds.head-rounds": 1,
    "rounds.num-rounds": 1,
    "giva.calibration-batches": 1,
    "giva.calibration-batch-size": 8,
}
#: The sites' methods whose time is not the engine's.
WORK = ("__init__", "calibrate", "build_bases", "train", "evaluate")


@dataclass(frozen=True)
class Phase:
    """One phase: its wall time, and how much of it was spent in the sites' methods."""

    name: str
    seconds: float
    work_seconds: float

    @property
    def overhead_seconds(self) -> float:
        """What the engine itself took."""
        return self.seconds - self.work_seconds


@dataclass(frozen=True)
class Simulated:
    """One process: its simulations' phases from the loaded model on, the last round's bytes, the peak memory.

    Attributes:
        load_seconds: Loading the model, by simulation.
        phases: Phases in order, by simulation.
        bytes_up: Bytes of one site in the last round, training and evaluation.
        bytes_down: The same, towards the site.
        numbers: Numbers that a site trains and sends in a round.
        peak_bytes: Peak resident memory of the process.
    """

    load_seconds: list[float]
    phases: list[list[Phase]]
    bytes_up: int
    bytes_down: int
    numbers: int
    peak_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything measured.

    Attributes:
        load_seconds: Median seconds to load the model.
        setup_seconds: Median seconds from the loaded model to the first training round, head rounds left out.
        setup_phases: The same by phase, each with the sites' part of it.
        round_seconds: Median seconds of a training round.
        round_overhead_seconds: Median seconds of it outside the sites' training and evaluation.
        numbers: Numbers that a site trains and sends.
        bytes_up: Bytes from a site in a round, evaluation included.
        bytes_up_ratio: To four bytes a number.
        bytes_down: Bytes to a site in a round: the arrays twice, to train from and to evaluate.
        bytes_down_ratio: To twice four bytes a number.
        alone_bytes: Peak memory of one site with all rows, without messages.
        few_bytes: Peak memory with 4 sites.
        many_bytes: Peak memory with 100 sites.
        memory_ratio: Peak memory of 100 sites to 4.
    """

    load_seconds: float
    setup_seconds: float
    setup_phases: list[Phase]
    round_seconds: float
    round_overhead_seconds: float
    numbers: int
    bytes_up: int
    bytes_up_ratio: float
    bytes_down: int
    bytes_down_ratio: float
    alone_bytes: int
    few_bytes: int
    many_bytes: int
    memory_ratio: float


# -- in the child processes -------------------------------------------------------------------------------------------


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Time the sites' methods; the function given returns the seconds since it was last asked."""
    from client.trainer import LocalTrainer

    total = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                total += time.perf_counter() - started

        return run

    def take() -> float:
        nonlocal total
        taken, total = total, 0.0
        return taken

    with ExitStack() as stack:
        for name in WORK:
            stack.enter_context(patch.object(LocalTrainer, name, timed(getattr(LocalTrainer, name))))
        yield take


def simulate_sites(config: RunConfig, repeats: int) -> Simulated:
    """Run the federation `repeats` times; the model is loaded before the clock starts."""
    import client.app  # noqa: F401  imported here so that no phase pays for it
    from client.backbone import get_backbone
    from server.run_store import RunStore
    from server.simulate import simulate

    loads, simulations = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        schema = get_backbone(config, config.train.device).schema
        loads.append(time.perf_counter() - started)
        phases: list[Phase] = []
        records: list[RoundRecord] = []
        with stopwatch() as take, tempfile.TemporaryDirectory() as folder:
            last = time.perf_counter()

            def watch(
                record: RoundRecord,
                phases: list[Phase] = phases,
                records: list[RoundRecord] = records,
                take: Callable[[], float] = take,
            ) -> None:
                nonlocal last
                now = time.perf_counter()
                phases.append(Phase(f"{record.phase} {record.round}", now - last, take()))
                records.append(record)
                last = now

            simulate(config, RunStore(folder), watch)
        simulations.append(phases)
    [site, *_] = records[-1].sites
    shapes = [*schema.vector_shapes().values(), *schema.state.values()]
    numbers = sum(math.prod(shape) for shape in shapes)
    return Simulated(loads, simulations, site.bytes_up, site.bytes_down, numbers, peak_bytes())


def train_one(config: RunConfig, folder: Path) -> Simulated:
    """The same training without a federation."""
    from client.alone import site_at, train_alone

    [site] = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    train_alone(config, site_at(site, config))
    return Simulated([], [], 0, 0, 0, peak_bytes())


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


# -- in the parent process --------------------------------------------------------------------------------------------


def deal(pooled: Path, target: Path, count: int) -> Path:
    """Deal the rows out to `count` sites like cards: the same rows in all, whatever the count."""
    for name, limit in (("train.jsonl", None), ("validation.jsonl", EVAL_ROWS)):
        rows = (pooled / name).read_text(encoding="utf-8").splitlines(keepends=True)[:limit]
        for index in range(count):
            folder = target / f"site-{index:03}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("".join(rows[index::count]), encoding="utf-8")
    return target


def in_process(folder: Path, settings: dict[str, Any], repeats: int) -> Simulated:
    """Run the sites in `folder` in a process of their own."""
    job = {"folder": str(folder), "settings": settings, "repeats": repeats}
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    found["phases"] = [[Phase(**phase) for phase in phases] for phases in found["phases"]]
    return Simulated(**found)


def work_off(folder: Path, settings: dict[str, Any], repeats: int) -> Simulated:
    """What a child process does."""
    count = sum(path.is_dir() for path in folder.iterdir())
    own = {"data.folder": str(folder), "data.eval-file": "validation.jsonl"}
    sites = {"rounds.min-sites": count, "rounds.quorum": count}
    config = RunConfig.from_toml(RECIPE, {**own, **sites, **settings})
    return train_one(config, folder) if count == 1 else simulate_sites(config, repeats)


def measure(repeats: int, settings: dict[str, Any]) -> Report:
    """Run the whole benchmark."""

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    pooled = medical().pooled
    with tempfile.TemporaryDirectory() as scratch:
        folders = {count: deal(pooled, Path(scratch) / str(count), count) for count in (1, FEW, MANY)}
        say(f"times and bytes with {FEW} sites")
        timed = in_process(folders[FEW], {**TIMED, **settings}, repeats)
        peaks = {}
        for count, folder in folders.items():
            say(f"memory with {count} sites")
            peaks[count] = in_process(folder, {**settings, **LEAN}, 1).peak_bytes
    return report_of(timed, peaks)


def report_of(timed: Simulated, peaks: dict[int, int]) -> Report:
    """Medians and ratios."""
    before = [[p for p in phases if not p.name.startswith(("head", "train"))] for phases in timed.phases]
    rounds = [p for phases in timed.phases for p in phases if p.name.startswith("train")]
    return Report(
        load_seconds=statistics.median(timed.load_seconds),
        setup_seconds=statistics.median(sum(p.seconds for p in phases) for phases in before),
        setup_phases=[
            Phase(
                same[0].name,
                statistics.median(p.seconds for p in same),
                statistics.median(p.work_seconds for p in same),
            )
            for same in zip(*before, strict=True)
        ],
        round_seconds=statistics.median(p.seconds for p in rounds),
        round_overhead_seconds=statistics.median(p.overhead_seconds for p in rounds),
        numbers=timed.numbers,
        bytes_up=timed.bytes_up,
        bytes_up_ratio=timed.bytes_up / (4 * timed.numbers),
        bytes_down=timed.bytes_down,
        bytes_down_ratio=timed.bytes_down / (8 * timed.numbers),
        alone_bytes=peaks[1],
        few_bytes=peaks[FEW],
        many_bytes=peaks[MANY],
        memory_ratio=peaks[MANY] / peaks[FEW],
    )


def table(report: Report) -> str:
    """For people."""
    lines = [f"{f'set-up, {FEW} sites':<34} {'seconds':>8} {'sites':>8} {'engine':>8}"]
    for phase in report.setup_phases:
        lines.append(
            f"  {phase.name:<32} {phase.seconds:>8.2f} {phase.work_seconds:>8.2f} {phase.overhead_seconds:>8.2f}"
        )
    lines += [
        f"{'model loaded to first round':<34} {report.setup_seconds:>8.2f}    (loading: {report.load_seconds:.2f})",
        f"{'a training round':<34} {report.round_seconds:>8.2f} "
        f"{report.round_seconds - report.round_overhead_seconds:>8.2f} {report.round_overhead_seconds:>8.3f}",
        "",
        f"{'a site in a round':<34} {'bytes':>8} {'numbers':>8}    bytes to 4 a number",
        f"{'up: update and evaluation':<34} {report.bytes_up:>8} {report.numbers:>8}    {report.bytes_up_ratio:.3f}",
        f"{'down: to train and to evaluate':<34} {report.bytes_down:>8} {2 * report.numbers:>8}    "
        f"{report.bytes_down_ratio:.3f}",
        "",
        f"{'peak resident memory':<34} {'bytes':>10} {f'to {FEW} sites':>12}",
    ]
    peaks = {"one site, no messages": report.alone_bytes, f"{FEW} sites": report.few_bytes}
    for label, peak in {**peaks, f"{MANY} sites": report.many_bytes}.items():
        lines.append(f"{label:<34} {bytes_text(peak):>10} {peak / report.few_bytes:>12.2f}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="simulations whose times are taken")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--job", help="run one simulation, described in JSON, and print what it came to")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the tables")
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        print(json.dumps(asdict(work_off(Path(job["folder"]), job["settings"], job["repeats"]))))
        return
    report = measure(options.repeats, parse_assignments(options.settings))
    print(json.dumps(asdict(report)) if options.json else table(report))


if __name__ == "__main__":
    main()
