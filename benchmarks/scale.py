"""The server against the number of sites: time and memory of updates and of sketches, and the memory of a simulation.

    python benchmarks/scale.py
    python benchmarks/scale.py --calibration-layers 160 --sites 10
    python benchmarks/scale.py --numbers 22_713_216 --strategies fedavg --sites 4 10      # `full` on MiniLM
    python benchmarks/scale.py --simulation --json

10, 100 and 1,000 sites send the vectors of OLMo2-7B at r = 64 (886,784 numbers) through Flower's messages to the
server's own code: pulled, read, checked, summed. The time is processor time of reading, checking and summing, not of
making the messages; memory is the peak above what the process had before the first answer, each count in a process of
its own. Beside the mean stands Flower's FedMedian, which needs every update at once. For calibration they send the
sketches of one layer of that model (all 160 are 147 MiB a site, and a thousand sites' would fill a disk), which are
checked, put away, and summed once all have come. `--simulation` adds what
`benchmarks/engine.py` measures: whole simulations of 4 and 100 sites that share one model (a few minutes; needs the
medical data).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ContextDecorator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import engine
import numpy as np
from _configs import CONFIGS, GATED
from _medical import medical
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from giva_core import calibration, protocol
from giva_core.aggregate import initial_vectors
from giva_core.config import GivaConfig, RunConfig
from giva_core.packing import Payload
from giva_core.protocol import Hello
from giva_core.types import Arrays, LayerShape, ModelSchema
from server import exchange
from server.cli.result import bytes_text
from server.rounds import KEPT_UPDATES
from server.sketch_shelf import KEPT_SKETCH_BYTES, SketchShelf, sketch_bytes
from server.sketches import SketchIntake
from server.strategy import make_aggregator
from server.updates import Intake

COUNTS = (10, 100, 1000)
#: Flower's FedMedian holds every update several times over: a thousand would need some 15 GB.
MEDIAN_COUNTS = (10, 100)
RANK = 64
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
class Calibration:
    """One calibration pass at the server.

    Attributes:
        layers: Layers that were sketched.
        sites: Sites that answered.
        sketch_bytes: Size of one site's sketches.
        seconds: Processor time of reading, checking, putting away and summing.
        seconds_per_site: The same for one site.
        peak_bytes: Peak memory above that before the first answer.
        written_bytes: What did not stay in memory.
    """

    layers: int
    sites: int
    sketch_bytes: int
    seconds: float
    seconds_per_site: float
    peak_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything measured; `simulation_bytes` is the peak memory of whole simulations by number of sites."""

    numbers: int
    update_bytes: int
    aggregations: list[Aggregation]
    calibrations: list[Calibration]
    simulation_bytes: dict[int, int]


def layers() -> tuple[LayerShape, ...]:
    """The adapted layers of OLMo2-7B."""
    _, values = CONFIGS["olmo2-7b"]
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    return tuple(
        LayerShape(f"{i}.{name}", inner if name == "up_proj" else hidden, inner if name == "down_proj" else hidden)
        for i in range(values["num_hidden_layers"])
        for name in GATED
    )


def vectors(numbers: int) -> Arrays:
    """The starting vectors of OLMo2-7B at r = 64, or so many zeros."""
    if numbers:
        return {"state": np.zeros(numbers, np.float32)}
    return initial_vectors(ModelSchema(layers(), (RANK,) * len(layers()), {}))


class ManySites(Grid):
    """A grid whose sites all answer at once, each with an answer of its own; a message is made when it is pulled."""

    def __init__(self, answer: Callable[[int], Payload]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._answer = answer
        self._asked: dict[str, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._asked = {str(message.metadata.dst_node_id): message.metadata.dst_node_id for message in messages}
        return list(self._asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            node_id = self._asked.pop(message_id)
            question = Message(exchange.to_content(Payload()), node_id, protocol.ROUND, ttl=60.0)
            question.metadata.__dict__["_message_id"] = message_id
            yield Message(exchange.to_content(self._answer(node_id)), reply_to=question)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._asked.values())

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    run = property(_unused)
    set_run = create_message = send_and_receive = _unused


class Clock(ContextDecorator):
    """Adds up processor time: of what is done in a `with` of it, and of all calls of a function put into it."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.process_time() - self._began


def names_of(sites: int) -> tuple[dict[str, int], dict[str, Hello]]:
    """Node id and introduction by site."""
    names = {f"site-{index:04}": index + 1 for index in range(sites)}
    schema = ModelSchema((), (), {})
    return names, {site: Hello(site, EXAMPLES, 0, schema, "", "", "", "", "cpu") for site in names}


def update(start: Arrays) -> Callable[[int], Payload]:
    """Makes a node's update."""
    packed = protocol.pack(start, list(start))
    noise = np.random.default_rng(0).normal(scale=0.01, size=packed.shape).astype(np.float32)
    values = {"num-examples": EXAMPLES, "num-steps": 9, "train-loss": 0.5, "bases": "", "seconds": 1.0}
    return lambda node_id: Payload({"state": packed + np.roll(noise, node_id)}, dict(values))


def aggregate(strategy: str, numbers: int, sites: int) -> Aggregation:
    """Take the updates of one round, in this process."""
    start = vectors(numbers)
    names, hellos = names_of(sites)
    aggregator = make_aggregator(RunConfig.from_flat({"strategy.name": strategy}))
    tells_error = not numbers
    keeps = not aggregator.is_mean or (tells_error and sites <= KEPT_UPDATES)  # as the round loop decides
    intake = Intake(hellos, start, list(start), keeps=keeps)
    clock = Clock()
    grid = ManySites(update(start))
    aggregator.prepare(1, start)
    before = engine.peak_bytes()
    size = sum(array.nbytes for array in start.values())
    take = clock(intake.take)
    answers = exchange.ask(
        grid, names, protocol.ROUND, Payload(), deadline_seconds=3600.0, take=take, answer_bytes=size
    )
    with clock:
        accepted = intake.accepted(answers)
        made = accepted.mean if accepted.mean is not None else aggregator.aggregate(1, accepted.updates)
    if len(accepted.updates) != sites or not all(np.isfinite(array).all() for array in made.values()):
        raise RuntimeError(f"{len(accepted.updates)} of {sites} updates were accepted: {accepted.records[0].reason}")
    peak = engine.peak_bytes() - before
    return Aggregation(strategy, sites, intake.keeps, clock.seconds, clock.seconds / sites, peak)


def calibrate(first: int, sites: int) -> Calibration:
    """Take the sketches of the first layers in one pass, in this process."""
    giva = GivaConfig(rank=RANK)
    sketched = layers()[:first]
    shapes = calibration.sketch_shapes(calibration.STAGES["range"], sketched, (RANK,) * len(sketched), giva)
    size = sketch_bytes(shapes, giva.sketch_bits)
    names, hellos = names_of(sites)
    numbers, columns = sum(n * q for n, q in shapes.values()), sum(q for _, q in shapes.values())
    codes = np.random.default_rng(0).integers(-(2**15) + 1, 2**15, numbers, np.int16)
    values = {"num-examples": giva.calibration_batches * giva.calibration_batch_size, "loss": 0.5}

    def sketch(node_id: int) -> Payload:
        exponents = np.full(columns, -20 + node_id % 5, np.int16)
        return Payload({"codes": np.roll(codes, node_id), "exponents": exponents}, dict(values))

    clock = Clock()
    grid = ManySites(sketch)
    before = engine.peak_bytes()
    with tempfile.TemporaryDirectory() as folder, SketchShelf(Path(folder), shapes, KEPT_SKETCH_BYTES) as shelf:
        shelf.check_room(sites, giva.sketch_bits)
        intake = SketchIntake(hellos, giva, shelf)
        take = clock(intake.take)
        answers = exchange.ask(
            grid, names, protocol.CALIBRATE, Payload(), deadline_seconds=3600.0, take=take, answer_bytes=size
        )
        with clock:
            heard = intake.heard(answers)
            heard.mean(giva.sketch_bits)
        if len(heard.sites) != sites:
            raise RuntimeError(f"{len(heard.sites)} of {sites} sketches were accepted: {heard.records[0].reason}")
        spent, peak = clock.seconds, engine.peak_bytes() - before
        return Calibration(len(sketched), sites, size, spent, spent / sites, peak, shelf.written_bytes)


# -- in the parent process --------------------------------------------------------------------------------------------


def in_process(job: str, *what: str | int) -> dict[str, Any]:
    """`aggregate` or `calibrate` in a process of its own."""
    print(*what, file=sys.stderr)
    command = [sys.executable, __file__, "--job", json.dumps([job, *what])]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def simulation_bytes() -> dict[int, int]:
    """Peak memory of simulations of 4 and of 100 sites, as `benchmarks/engine.py` runs them."""
    pooled = medical().pooled
    with tempfile.TemporaryDirectory() as scratch:
        return {
            count: engine.in_process(engine.deal(pooled, Path(scratch) / str(count), count), engine.LEAN, 1).peak_bytes
            for count in (engine.FEW, engine.MANY)
        }


def measure(counts: list[int], strategies: list[str], numbers: int, sketched: int, with_simulation: bool) -> Report:
    """Run the whole benchmark."""
    most = {"fedavg": max(counts), "fedmedian": max(MEDIAN_COUNTS)}
    jobs = [(strategy, numbers, count) for strategy in strategies for count in counts if count <= most[strategy]]
    updates = [Aggregation(**in_process("aggregate", *job)) for job in jobs]
    sketches = [Calibration(**in_process("calibrate", sketched, count)) for count in counts if sketched]
    numbers = sum(array.size for array in vectors(numbers).values())
    return Report(numbers, 4 * numbers, updates, sketches, simulation_bytes() if with_simulation else {})


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
    lines.append(
        f"{'layers':<10} {'sites':>6} {'a sketch':>8} {'seconds':>8} {'a site':>10} {'peak memory':>12} {'file':>11}"
    )
    for found in report.calibrations:
        lines.append(
            f"{found.layers:<10} {found.sites:>6} {bytes_text(found.sketch_bytes):>8} {found.seconds:>8.2f} "
            f"{1000 * found.seconds_per_site:>7.1f} ms {bytes_text(found.peak_bytes):>12} "
            f"{bytes_text(found.written_bytes):>11}"
        )
    for count, peak in report.simulation_bytes.items():
        lines.append(f"a simulation of {count} sites: {bytes_text(peak)} in all")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--calibration-layers", type=int, default=1, help="layers that are sketched; 0: none")
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "fedmedian"], choices=["fedavg", "fedmedian"])
    parser.add_argument("--numbers", type=int, default=0, help="weights, which have no aggregation error, instead")
    parser.add_argument("--simulation", action="store_true", help="whole simulations as well")
    parser.add_argument("--job", help="take one round's or pass's answers, described in JSON, and print the cost")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the tables")
    options = parser.parse_args()
    if options.job:
        job, *what = json.loads(options.job)
        print(json.dumps(asdict({"aggregate": aggregate, "calibrate": calibrate}[job](*what))))
        return
    report = measure(options.sites, options.strategies, options.numbers, options.calibration_layers, options.simulation)
    print(json.dumps(asdict(report)) if options.json else table(report))


if __name__ == "__main__":
    main()
