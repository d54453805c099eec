"""The server against the number of sites: time and memory of a round's updates, and the memory of a simulation.

    python benchmarks/scale.py
    python benchmarks/scale.py --simulation --json

10, 100 and 1,000 sites send the vectors of OLMo2-7B at r = 64 (886,784 numbers) through Flower's messages to the
server's own code: pulled, read, checked, summed. The time is processor time of reading, checking and summing, not of
making the messages; memory is the peak above what the process had before the first answer, each count in a process of
its own. Beside the mean stands Flower's FedMedian, which needs every update at once. `--simulation` adds what
`benchmarks/engine.py` measures: whole simulations of 4 and 100 sites that share one model (a few minutes; needs the
medical data).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from giva_core import protocol
from giva_core.aggregate import initial_vectors
from giva_core.config import RunConfig
from giva_core.packing import Payload
from giva_core.protocol import Hello
from giva_core.types import Arrays, LayerShape, ModelSchema
from server import exchange
from server.cli.result import bytes_text
from server.rounds import KEPT_UPDATES
from server.strategy import make_aggregator
from server.updates import Intake

COUNTS = (10, 100, 1000)
#: Flower's FedMedian holds every update several times over: a thousand would need some 15 GB.
MEDIAN_COUNTS = (10, 100)
RANK, LAYERS = 64, 32
MODULES = {"q_proj": 4096, "k_proj": 4096, "v_proj": 4096, "up_proj": 11008, "down_proj": 4096}
EXAMPLES = 1000


@dataclass(frozen=True)
class Aggregation:
    """One round's updates at the server.

    Attributes:
        strategy: `fedavg` or `fedmedian`.
        sites: Sites that answered.
        keeps: Whether every update was kept until the last one came.
        seconds: Processor time of reading, checking and summing.
        seconds_per_site: The same for one site.
        peak_bytes: Peak memory above that before the first answer.
    """

    strategy: str
    sites: int
    keeps: bool
    seconds: float
    seconds_per_site: float
    peak_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything measured; `simulation_bytes` is the peak memory of whole simulations by number of sites."""

    numbers: int
    update_bytes: int
    aggregations: list[Aggregation]
    simulation_bytes: dict[int, int]


def vectors() -> Arrays:
    """The starting vectors of OLMo2-7B at r = 64."""
    layers = tuple(LayerShape(f"{i}.{name}", width, 4096) for i in range(LAYERS) for name, width in MODULES.items())
    return initial_vectors(ModelSchema(layers, (RANK,) * len(layers), {}))


class ManySites(Grid):
    """A grid whose sites all answer at once, each with an update of its own; a message is made when it is pulled."""

    def __init__(self, start: Arrays) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._start = protocol.pack(start, list(start))
        self._noise = np.random.default_rng(0).normal(scale=0.01, size=self._start.shape).astype(np.float32)
        self._asked: dict[str, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._asked = {str(message.metadata.dst_node_id): message.metadata.dst_node_id for message in messages}
        return list(self._asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            node_id = self._asked.pop(message_id)
            values = {"num-examples": EXAMPLES, "num-steps": 9, "train-loss": 0.5, "bases": "", "seconds": 1.0}
            state = self._start + np.roll(self._noise, node_id)
            question = Message(exchange.to_content(Payload()), node_id, protocol.ROUND, ttl=60.0)
            question.metadata.__dict__["_message_id"] = message_id
            yield Message(exchange.to_content(Payload({"state": state}, values)), reply_to=question)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._asked.values())

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    run = property(_unused)
    set_run = create_message = send_and_receive = _unused


def aggregate(strategy: str, sites: int) -> Aggregation:
    """Take the updates of one round, in this process."""
    start = vectors()
    names = {f"site-{index:04}": index + 1 for index in range(sites)}
    schema = ModelSchema((), (), {name: array.shape for name, array in start.items()})
    hellos = {site: Hello(site, EXAMPLES, 0, schema, "", "", "", "", "cpu") for site in names}
    aggregator = make_aggregator(RunConfig.from_flat({"strategy.name": strategy}))
    intake = Intake(hellos, start, list(start), keeps=sites <= KEPT_UPDATES or not aggregator.is_mean)
    spent = 0.0

    def take(answer: exchange.Answer) -> exchange.Answer:
        nonlocal spent
        began = time.process_time()
        slim = intake.take(answer)
        spent += time.process_time() - began
        return slim

    grid = ManySites(start)
    aggregator.prepare(1, start)
    before = peak_bytes()
    answers = exchange.ask(grid, names, protocol.ROUND, Payload(), deadline_seconds=3600.0, take=take)
    began = time.process_time()
    accepted = intake.accepted(answers)
    made = accepted.mean if accepted.mean is not None else aggregator.aggregate(1, accepted.updates)
    spent += time.process_time() - began
    if len(accepted.updates) != sites or not all(np.isfinite(array).all() for array in made.values()):
        raise RuntimeError(f"{len(accepted.updates)} of {sites} updates were accepted: {accepted.records[0].reason}")
    return Aggregation(strategy, sites, intake.keeps, spent, spent / sites, peak_bytes() - before)


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


# -- in the parent process --------------------------------------------------------------------------------------------


def in_process(strategy: str, sites: int) -> Aggregation:
    """`aggregate` in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps([strategy, sites])]
    return Aggregation(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def simulation_bytes() -> dict[int, int]:
    """Peak memory of simulations of 4 and of 100 sites, as `benchmarks/engine.py` runs them."""
    import engine

    from client.prepare import prepare
    from giva_core.paths import giva_home

    pooled = prepare("medical", home=giva_home(), progress=lambda text: print(text, file=sys.stderr)).pooled
    with tempfile.TemporaryDirectory() as scratch:
        return {
            count: engine.in_process(engine.deal(pooled, Path(scratch) / str(count), count), engine.LEAN, 1).peak_bytes
            for count in (engine.FEW, engine.MANY)
        }


def measure(counts: list[int], with_simulation: bool) -> Report:
    """Run the whole benchmark."""
    jobs = [("fedavg", count) for count in counts]
    jobs += [("fedmedian", count) for count in counts if count <= max(MEDIAN_COUNTS)]
    found = []
    for strategy, count in jobs:
        print(f"{strategy}, {count} sites", file=sys.stderr)
        found.append(in_process(strategy, count))
    numbers = sum(array.size for array in vectors().values())
    return Report(numbers, 4 * numbers, found, simulation_bytes() if with_simulation else {})


def table(report: Report) -> str:
    """For people."""
    lines = [
        f"{report.numbers:,} numbers, {bytes_text(report.update_bytes)} an update",
        f"{'strategy':<10} {'sites':>6} {'updates':>8} {'seconds':>8} {'a site':>10} {'peak memory':>12} "
        f"{'in updates':>11}",
    ]
    for row in report.aggregations:
        lines.append(
            f"{row.strategy:<10} {row.sites:>6} {'kept' if row.keeps else 'summed':>8} {row.seconds:>8.2f} "
            f"{1000 * row.seconds_per_site:>7.1f} ms {bytes_text(row.peak_bytes):>12} "
            f"{row.peak_bytes / report.update_bytes:>11.1f}"
        )
    for count, peak in report.simulation_bytes.items():
        lines.append(f"a simulation of {count} sites: {bytes_text(peak)} in all")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--simulation", action="store_true", help="whole simulations as well")
    parser.add_argument("--job", help="take one round's updates, described in JSON, and print what it came to")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the tables")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(asdict(aggregate(*json.loads(options.job)))))
        return
    report = measure(options.sites, options.simulation)
    print(json.dumps(asdict(report)) if options.json else table(report))


if __name__ == "__main__":
    main()
