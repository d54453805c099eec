"""Many adapters on one model: memory, switching and mixed batches, beside PEFT's LoRA of the same rank.

    python benchmarks/adapter_bank.py
    python benchmarks/adapter_bank.py --json

1,000 random adapters of the encoder that `giva data prepare` fetches, all linear layers, rank 8, are put into a bank,
and as many LoRA adapters as `--baseline` says into PEFT's model; what PEFT needs for 1,000 is its bytes for one times
1,000. Times are medians; the two models take turns. A mixed batch has another adapter in every row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from _shapes import random_bases
from _timing import Work, in_turn, wall_seconds
from torch import nn

from giva_core.adapter_bank import AdapterBank
from giva_core.config import GivaConfig, RunConfig, parse_assignments
from giva_core.inject import layer_shapes
from giva_core.models import TaskModel, load_task_model
from giva_core.paths import giva_home
from giva_core.types import Arrays, BasesSet
from server.cli.result import bytes_text

ROWS, LENGTH = 32, 64


@dataclass(frozen=True)
class Measured:
    """What one kind of bank takes.

    Attributes:
        adapters: Adapters that were loaded for the times.
        bytes_each: Bytes of one adapter: vectors, or LoRA's matrices.
        bytes_thousand: Bytes of 1,000; of the bank as allocated, of PEFT's 1,000 times `bytes_each`.
        resident_bytes: Growth of the process's resident memory by the loaded adapters.
        add_ms: Adding one adapter.
        switch_us: Switching to another adapter.
        one_ms: A batch in which all rows use the same adapter.
        mixed_ms: A batch in which every row uses another one.
    """

    adapters: int
    bytes_each: int
    bytes_thousand: int
    resident_bytes: int
    add_ms: float
    switch_us: float
    one_ms: float
    mixed_ms: float


@dataclass(frozen=True)
class Report:
    """All figures of a run.

    Attributes:
        layers: Adapted layers.
        rank: The rank of both.
        bases_bytes: Bytes of the bases, once for all adapters.
        base_ms: The batch on the plain model.
        bank: The bank, float32 vectors.
        lora: PEFT's LoRA.
        with_heads_bytes: 1,000 adapters with a head of 18 classes each, by type of the stored numbers.
        half_error: Largest difference of a logit when vectors and head are stored as float16, and the largest logit.
    """

    layers: int
    rank: int
    bases_bytes: int
    base_ms: float
    bank: Measured
    lora: Measured
    with_heads_bytes: dict[str, int]
    half_error: tuple[float, float]


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def median(run: Work, repeats: int, scale: float) -> float:
    """Median time of `run`, in seconds times `scale`."""
    return statistics.median(wall_seconds(run) for _ in range(repeats)) * scale


def loaded() -> TaskModel:
    """The encoder with a head of 18 classes."""
    labels = [f"class {index}" for index in range(18)]
    settings = parse_assignments([f"task.labels={json.dumps(labels)}"])
    path = str(giva_home() / "models" / "all-MiniLM-L6-v2")
    return load_task_model(RunConfig.from_flat({**settings, "model.path": path}))


def random_adapter(bases: BasesSet, seed: int, head: bool) -> Arrays:
    """Vectors of a trained adapter's size, perhaps with a head."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for name, layer in bases.layers.items():
        arrays[f"{name}.lambda_o"] = 0.1 * rng.standard_normal(layer.B.shape[0], dtype=np.float32)
        arrays[f"{name}.lambda_s"] = 1 + 0.1 * rng.standard_normal(layer.B.shape[1], dtype=np.float32)
    if head:
        arrays["classifier.weight"] = 0.1 * rng.standard_normal((18, 384), dtype=np.float32)
        arrays["classifier.bias"] = 0.1 * rng.standard_normal(18, dtype=np.float32)
    return arrays


def batch_of(task: TaskModel) -> dict[str, torch.Tensor]:
    """`ROWS` examples of `LENGTH` tokens."""
    tokens = torch.randint(1000, 20000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def lora_model(task: TaskModel, bases: BasesSet, rank: int, adapters: int) -> tuple[nn.Module, float, int]:
    """PEFT's model with random LoRA adapters, the time to add one in ms, and the growth of resident memory."""
    import peft

    settings = peft.LoraConfig(
        r=rank, target_modules=list(bases.layers), init_lora_weights=False, inference_mode=True, bias="none"
    )
    model = peft.get_peft_model(task.model, settings, "task-0")
    before = resident()
    times = []
    for index in range(1, adapters):
        start = time.perf_counter()
        model.add_adapter(f"task-{index}", settings)
        times.append(time.perf_counter() - start)
    return model.eval(), statistics.median(times) * 1e3, (resident() - before) * adapters // (adapters - 1)


def with_heads(bases: BasesSet, dtype: torch.dtype, batch: dict[str, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes of 1,000 adapters with heads, and the logits of one of them."""
    task = loaded()
    bank = AdapterBank(task.model, bases, heads=task.head_modules, capacity=1000, dtype=dtype)
    for index in range(1000):
        bank.add(f"task-{index}", random_adapter(bases, index, head=True))
    bank.switch("task-500")
    return bank.nbytes, task.forward(batch)


@torch.no_grad()
def measure(rank: int, adapters: int, baseline: int, repeats: int) -> Report:
    """Fill both, and let them take turns."""
    plain, served, task = loaded(), loaded(), loaded()
    bases = random_bases(*layer_shapes(task.model, GivaConfig(rank=rank), exclude=task.head_modules))
    batch = batch_of(task)
    before = resident()
    bank = AdapterBank(task.model, bases, capacity=adapters)
    start = time.perf_counter()
    for index in range(adapters):
        bank.add(f"task-{index}", random_adapter(bases, index, head=False))
    add_ms = (time.perf_counter() - start) / adapters * 1e3
    bank_resident = resident() - before
    lora, lora_add_ms, lora_resident = lora_model(served, bases, rank, baseline)

    names = [f"task-{index * 7 % adapters}" for index in range(ROWS)]
    lora_names = [f"task-{index % baseline}" for index in range(ROWS)]

    def mixed() -> None:
        with bank.route(names):
            task.forward(batch)

    def cycle(switch: Callable[[str], object], count: int) -> Work:
        chosen = itertools.cycle(range(count))
        return lambda: switch(f"task-{next(chosen)}")

    runs: dict[str, Work] = {
        "base": lambda: plain.forward(batch),
        "bank one": lambda: task.forward(batch),
        "bank mixed": mixed,
        "lora one": lambda: lora(**batch),
        "lora mixed": lambda: lora(**batch, adapter_names=lora_names),
    }
    bank.switch("task-1")
    lora.set_adapter("task-1")
    ms = {name: 1e3 * statistics.median(found) for name, found in in_turn(runs, repeats).items()}
    vectors = 4 * sum(sum(layer.B.shape) for layer in bases.layers.values())
    matrices = 4 * sum(layer.A.size + layer.B.size for layer in bases.layers.values())
    full, expected = with_heads(bases, torch.float32, batch)
    half, found = with_heads(bases, torch.float16, batch)
    return Report(
        layers=len(bases.layers),
        rank=rank,
        bases_bytes=matrices,
        base_ms=ms["base"],
        bank=Measured(
            adapters, vectors, bank.nbytes * 1000 // adapters, bank_resident, add_ms,
            median(cycle(bank.switch, adapters), 10_000, 1e6), ms["bank one"], ms["bank mixed"],
        ),
        lora=Measured(
            baseline, matrices, matrices * 1000, lora_resident, lora_add_ms,
            median(cycle(lora.set_adapter, baseline), 10, 1e6), ms["lora one"], ms["lora mixed"],
        ),
        with_heads_bytes={"float32": full, "float16": half},
        half_error=(float((expected - found).abs().max()), float(expected.abs().max())),
    )  # fmt: skip


def table(report: Report) -> str:
    """For people."""
    rows: Sequence[tuple[str, Callable[[Measured], str]]] = (
        ("adapters loaded", lambda m: f"{m.adapters:,}"),
        ("one adapter", lambda m: bytes_text(m.bytes_each)),
        ("1,000 adapters", lambda m: bytes_text(m.bytes_thousand)),
        ("resident memory of those loaded", lambda m: bytes_text(m.resident_bytes)),
        ("add one", lambda m: f"{m.add_ms:.2f} ms"),
        ("switch", lambda m: f"{m.switch_us:,.2f} µs"),
        (f"batch of {ROWS}, one adapter", lambda m: f"{m.one_ms:.1f} ms"),
        (f"batch of {ROWS}, {ROWS} adapters", lambda m: f"{m.mixed_ms:.1f} ms"),
    )
    lines = [
        f"{report.layers} layers, rank {report.rank}; the bases take {bytes_text(report.bases_bytes)} once; "
        f"the plain model takes {report.base_ms:.1f} ms a batch of {ROWS} × {LENGTH} tokens",
        "",
        f"{'':<34} {'GiVA bank':>14} {'PEFT LoRA':>14}",
        *(f"{label:<34} {show(report.bank):>14} {show(report.lora):>14}" for label, show in rows),
        "",
        "1,000 adapters with a head of 18 classes each: "
        + ", ".join(f"{bytes_text(size)} as {dtype}" for dtype, size in report.with_heads_bytes.items()),
        f"float16 changes a logit by {report.half_error[0]:.1e} at most, of {report.half_error[1]:.2f}",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=1000, help="adapters in the bank")
    parser.add_argument("--baseline", type=int, default=32, help="adapters in PEFT's model")
    parser.add_argument("--repeats", type=int, default=7, help="batches of each kind")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    options = parser.parse_args()
    report = measure(options.rank, options.adapters, options.baseline, options.repeats)
    print(json.dumps(asdict(report)) if options.json else table(report))


if __name__ == "__main__":
    main()
