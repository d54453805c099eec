"""Federated calibration on a real encoder: energy the bases capture, exact aggregation, time, memory.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --json

Four sites with medical questions train the head for a few steps and then sketch their gradients, as in a run. `G` is
the dense gradient of all sites' calibration examples, by autograd; the energy of bases `A` with orthonormal rows is
‖G Aᵀ‖² / ‖G‖². Compared are the exact singular vectors of G, `torch.svd_lowrank` of G, and what a site would find
alone. Times are medians of interleaved repetitions; memory is the peak above the loaded model, in processes of their
own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from _gradients import (
    Batches,
    Gradients,
    energy,
    exact_rows,
    federated_sketches,
    forward_backward,
    lowrank_rows,
    make_sites,
    rebatched,
    sketch,
    train_head,
    weight_gradients,
)
from _timing import Work, in_turn

from giva_core import aggregate, bases, calibration
from giva_core.bases import dequantise
from giva_core.config import GivaConfig
from giva_core.errors import BasesError
from giva_core.models import TaskModel
from giva_core.types import BasesSet, LayerShape
from server.cli.result import bytes_text

BITS, POWER_PASSES = (8, 12, 16, 20), (0, 1, 2)
#: Columns of a sketch beyond the rank, and bits: every number of bits, and wider sketches.
FORMS = (*((8, bits) for bits in BITS), (16, 16), (24, 8), (24, 16))
VARIANTS = ("forward-backward", "sketch", "weight-gradients", "svd-lowrank")


@dataclass(frozen=True)
class Energy:
    """How much of the federation's gradient the bases capture, over the layers.

    Attributes:
        passes: Power passes.
        oversampling: Columns of the sketch beyond the rank.
        bits: Bits of a sketch's entry.
        of_lowrank_min: Smallest ratio to the energy of `torch.svd_lowrank(G, q=4r, niter=4)`.
        of_lowrank_median: Its median.
        of_exact_min: Smallest ratio to the energy of the exact top-r singular vectors.
        of_exact_median: Its median.
        bytes_up: Bytes of all sketches that a site sends; about as many come back.
        failed: Why no bases could be built; empty if they could.
    """

    passes: int
    oversampling: int
    bits: int
    of_lowrank_min: float | None
    of_lowrank_median: float | None
    of_exact_min: float | None
    of_exact_median: float | None
    bytes_up: int
    failed: str = ""


@dataclass(frozen=True)
class Spread:
    """The median and the largest of one number for each layer."""

    median: float
    largest: float


@dataclass(frozen=True)
class Report:
    """Everything measured.

    Attributes:
        layers: Adapted layers.
        rank: Rank of the bases.
        examples: Calibration examples of all sites.
        dense_bytes: Bytes of the dense gradient that a site would send instead.
        exact_energy: Median share of ‖G‖² in the exact top-r directions.
        alone_of_exact: The median over layers of a site's own exact top-r directions, as ratio; the worst site's.
        energies: One entry for each number of passes and bits.
        aggregation: Relative error of the mean of the sites' sketches against the pooled sketch, by form.
        seconds: Median seconds on one batch, by variant; `calibration` is one power pass (three sketches) and bases.
        ratios: Median of the ratio to `forward-backward`, repetition by repetition.
        peak_bytes: Peak memory above the loaded model on the same batch; empty where the system does not tell.
    """

    layers: int
    rank: int
    examples: int
    dense_bytes: int
    exact_energy: float
    alone_of_exact: float
    energies: list[Energy]
    aggregation: dict[str, Spread]
    seconds: dict[str, float]
    ratios: dict[str, float]
    peak_bytes: dict[str, int]


# -- energy -----------------------------------------------------------------------------------------------------------


def measure_energies(
    task: TaskModel,
    layers: Sequence[LayerShape],
    ranks: Sequence[int],
    giva: GivaConfig,
    sites: Sequence[Batches],
    pooled: Gradients,
    exact: dict[str, float],
) -> list[Energy]:
    """The energy of the federated bases for every number of passes and bits."""
    lowrank = {
        layer.name: energy(pooled[layer.name], lowrank_rows(pooled[layer.name], r))
        for layer, r in zip(layers, ranks, strict=True)
    }
    found = []
    for oversampling, bits in FORMS:
        settings = replace(giva, oversampling=oversampling, sketch_bits=bits, power_passes=max(POWER_PASSES))
        stages = federated_sketches(task, layers, ranks, settings, sites)
        for passes, (sketches, sent) in zip(POWER_PASSES, stages, strict=True):
            try:
                built: BasesSet = bases.build_bases(layers, ranks, sketches, settings)
            except BasesError as error:
                reason = str(error).splitlines()[0]
                found.append(Energy(passes, oversampling, bits, None, None, None, None, sent, reason))
                continue
            own = {name: energy(pooled[name], torch.from_numpy(pair.A)) for name, pair in built.layers.items()}
            of_lowrank = [own[name] / lowrank[name] for name in own]
            of_exact = [own[name] / exact[name] for name in own]
            found.append(
                Energy(
                    passes,
                    oversampling,
                    bits,
                    min(of_lowrank),
                    statistics.median(of_lowrank),
                    min(of_exact),
                    statistics.median(of_exact),
                    sent,
                )
            )
    return sorted(found, key=lambda item: (item.passes, item.oversampling, item.bits))


# -- aggregation ------------------------------------------------------------------------------------------------------


def measure_aggregation(
    task: TaskModel,
    layers: Sequence[LayerShape],
    ranks: Sequence[int],
    giva: GivaConfig,
    sites: Sequence[Batches],
) -> dict[str, Spread]:
    """The mean of the sites' sketches against the sketch of the pooled examples.

    The model itself rounds otherwise where texts are padded otherwise, so `float32` pools the sites' own batches, and
    `float32, rebatched` shows that part.
    """
    [stage, *_] = calibration.stages(giva)
    multipliers = calibration.multipliers(stage, layers, ranks, giva, None)
    found = [sketch(task, layers, multipliers, stage.side, batches) for batches in sites]
    pooled = [batch for batches in sites for batch in batches]
    wanted = sketch(task, layers, multipliers, stage.side, pooled).arrays
    mixed = sketch(task, layers, multipliers, stage.side, rebatched(pooled, giva.calibration_batch_size)).arrays
    weights = [each.num_examples for each in found]
    mean = aggregate.weighted_mean([each.arrays for each in found], weights)
    errors = {
        "float32": _spread([_relative(mean[name], wanted[name]) for name in wanted]),
        "float32, rebatched": _spread([_relative(mean[name], mixed[name]) for name in wanted]),
    }
    for bits in BITS:
        coded = {name: [bases.quantise(each.arrays[name], bits) for each in found] for name in wanted}
        coarse = {name: dequantise(bases.mean_sketch(sketches, weights, bits)) for name, sketches in coded.items()}
        errors[f"{bits} bits"] = _spread([_relative(coarse[name], wanted[name]) for name in wanted])
    return errors


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), max(values))


# -- time and memory --------------------------------------------------------------------------------------------------


def variants(
    task: TaskModel, layers: Sequence[LayerShape], ranks: Sequence[int], giva: GivaConfig, batches: Batches
) -> dict[str, Work]:
    """The pieces of work that are compared, on the same batches."""
    [stage, *_] = calibration.stages(giva)
    multipliers = calibration.multipliers(stage, layers, ranks, giva, None)

    def lowrank() -> None:
        gradients = weight_gradients(task, layers, batches)
        for layer, r in zip(layers, ranks, strict=True):
            lowrank_rows(gradients[layer.name], r)

    return {
        "forward-backward": lambda: forward_backward(task, layers[0], batches),
        "sketch": lambda: sketch(task, layers, multipliers, stage.side, batches),
        "weight-gradients": lambda: weight_gradients(task, layers, batches),
        "svd-lowrank": lowrank,
    }


def measure_seconds(work: dict[str, Work], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each, and the median ratio to the first."""
    seconds = in_turn(work, repeats)
    [floor, *_] = seconds.values()
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, floor, strict=True)) for name, found in seconds.items()
    }
    return {name: statistics.median(found) for name, found in seconds.items()}, ratios


def peak_of(variant: str, seed: int) -> int:
    """Peak memory of a variant above what is resident before it, after a warm-up on one example; Linux only."""
    [site, *_] = make_sites(seed)
    layers, ranks, giva = site.schema.layers, site.schema.ranks, site.config.giva
    [batch, *_] = site.calibration_batches()
    tiny = {name: tensor[:1, :8] if tensor.ndim == 2 else tensor[:1] for name, tensor in batch.items()}
    variants(site.backbone.task, layers, ranks, giva, [tiny])[variant]()
    run = variants(site.backbone.task, layers, ranks, giva, [batch])[variant]
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again from what is resident now
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure_peaks(seed: int) -> dict[str, int]:
    """Peak memory of every variant, each in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    found = {}
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc: what is freed leaves the process at once
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--seed", str(seed), "--peak-of", variant]
        done = subprocess.run(command, env=exact, stdout=subprocess.PIPE, text=True, check=True)
        found[variant] = int(done.stdout)
    return found


# -- all of it --------------------------------------------------------------------------------------------------------


def measure(seed: int, repeats: int, memory: bool) -> Report:
    """Run the whole benchmark."""
    sites = make_sites(seed)
    print("training the head", file=sys.stderr)
    head = train_head(sites)
    backbone, config = sites[0].backbone, sites[0].config
    task, layers, ranks, giva = backbone.task, backbone.schema.layers, backbone.schema.ranks, config.giva
    backbone.write(head)
    by_site = [list(site.calibration_batches()) for site in sites]
    examples = sum(len(batch["labels"]) for batches in by_site for batch in batches)

    print("dense gradients", file=sys.stderr)
    own = [weight_gradients(task, layers, batches) for batches in by_site]
    pooled = {name: torch.stack([one[name] for one in own]).sum(0) / examples for name in own[0]}
    rank_of = {layer.name: r for layer, r in zip(layers, ranks, strict=True)}
    exact = {name: energy(G, exact_rows(G, rank_of[name])) for name, G in pooled.items()}
    alone = [
        statistics.median(energy(G, exact_rows(one[name], rank_of[name])) / exact[name] for name, G in pooled.items())
        for one in own
    ]
    print("federated sketches", file=sys.stderr)
    energies = measure_energies(task, layers, ranks, giva, by_site, pooled, exact)
    aggregation = measure_aggregation(task, layers, ranks, giva, by_site)

    print("time", file=sys.stderr)
    batch = by_site[0][:1]
    work = variants(task, layers, ranks, giva, batch)

    def one_power_pass() -> None:
        *_, (sketches, _) = federated_sketches(task, layers, ranks, replace(giva, power_passes=1), [batch])
        bases.build_bases(layers, ranks, sketches, giva)

    seconds, ratios = measure_seconds({**work, "calibration": one_power_pass}, repeats)
    return Report(
        layers=len(layers),
        rank=giva.rank,
        examples=examples,
        dense_bytes=4 * sum(layer.d_out * layer.d_in for layer in layers),
        exact_energy=statistics.median(exact.values()),
        alone_of_exact=min(alone),
        energies=energies,
        aggregation=aggregation,
        seconds=seconds,
        ratios=ratios,
        peak_bytes=measure_peaks(seed) if memory else {},
    )


def table(report: Report) -> str:
    """For people."""
    lines = [
        f"{report.layers} layers, rank {report.rank}, {report.examples} calibration examples at four sites; "
        f"a dense gradient is {bytes_text(report.dense_bytes)}",
        f"exact top-{report.rank} directions hold {report.exact_energy:.3f} of ‖G‖² (median layer); "
        f"those of the worst site alone {report.alone_of_exact:.3f} of that",
        "",
        f"{'power passes':>12} {'columns':>8} {'bits':>5} {'of svd_lowrank: min':>20} {'median':>8} "
        f"{'of exact: min':>14} {'median':>8} {'up/site':>10}",
    ]
    for item in report.energies:
        ratios = (item.of_lowrank_min, item.of_lowrank_median, item.of_exact_min, item.of_exact_median)
        shown = ["-" if ratio is None else f"{ratio:.4f}" for ratio in ratios]
        figures = f"{shown[0]:>20} {shown[1]:>8} {shown[2]:>14} {shown[3]:>8} {bytes_text(item.bytes_up):>10}"
        columns = f"r + {item.oversampling}"
        lines.append(f"{item.passes:>12} {columns:>8} {item.bits:>5} {figures} {item.failed}".rstrip())
    lines += ["", f"{'mean of four sketches':<24} {'error: median':>14} {'largest':>10}   to the pooled sketch"]
    lines += [f"{form:<24} {item.median:>14.1e} {item.largest:>10.1e}" for form, item in report.aggregation.items()]
    labels = {
        "forward-backward": "forward and backward only",
        "sketch": "one sketch pass, by hooks",
        "weight-gradients": "weight gradients",
        "svd-lowrank": "weight gradients + svd_lowrank",
        "calibration": "three sketch passes + exact bases",
    }
    lines += ["", f"{'on one batch':<36} {'seconds':>8} {'ratio':>6} {'peak memory':>12}"]
    for name, label in labels.items():
        peak = bytes_text(report.peak_bytes[name]) if name in report.peak_bytes else "-"
        lines.append(f"{label:<36} {report.seconds[name]:>8.3f} {report.ratios[name]:>6.2f} {peak:>12}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the sketches and the head's training")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each timing")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, four processes")
    parser.add_argument("--peak-of", choices=VARIANTS, help="print one variant's peak memory in bytes, nothing else")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the tables")
    options = parser.parse_args()
    if options.peak_of:
        print(peak_of(options.peak_of, options.seed))
        return
    report = measure(options.seed, options.repeats, not options.no_memory)
    print(json.dumps(asdict(report)) if options.json else table(report))


if __name__ == "__main__":
    main()
