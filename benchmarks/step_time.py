"""A training step of GiVA beside LoRA and VeRA: time, activation memory, calibration.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --shapes qwen2-0.5b olmo2-7b dinov2-base clip-large --device cuda --dtype bfloat16 \\
        --methods giva lora vera osora randlora --bases

Every method adapts the same layers of the same model, which has a known shape and random weights, and takes the same
batch: forward, backward, clipping, AdamW. All methods take their steps in turn; a ratio is the median of the ratios
repetition by repetition, and seconds are the processor's on a CPU, so that what else the machine does falls out.
`frozen` is forward and backward through the model without an adapter, the floor, from the first adapted layers' outputs
on. Activations are what autograd keeps between forward and backward above that floor, weights left out; on a GPU the
peak of allocated memory during a step stands beside them, and a method that does not fit is left out. PEFT's adapters
are of the weights' type. `speed` is the share of a plain matrix product's speed on the same device. Bases are random
unless `--bases` asks for calibrated ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits takes no processor time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from _shapes import METHODS, SHAPES, Batch, build, make_batch, random_bases, sharing_copy, tokens_of
from _timing import Work, in_turn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from giva_core import adapt, calibration
from giva_core.config import GivaConfig
from giva_core.errors import BasesError
from giva_core.inject import layer_shapes
from giva_core.sketch import sketch_pass
from giva_core.types import LayerShape
from server.cli.result import bytes_text

FLOOR, REFERENCE = "frozen", "lora"


@dataclass(frozen=True)
class Measured:
    """One method on one shape.

    Attributes:
        rank: Its rank.
        trained: Trained numbers, without the head.
        step_seconds: Median of a step.
        of_lora: Median ratio of a step to LoRA's, repetition by repetition; None without LoRA.
        activation_bytes: Kept for the backward pass, above the frozen model's.
        activations_of_lora: The same as ratio to LoRA's.
        peak_bytes: Allocated during a step above what was before it; None on a CPU.
        speed: Products of the frozen model's forward and backward pass a second of a step, as share of the device's.
    """

    rank: int
    trained: int
    step_seconds: float
    of_lora: float | None
    activation_bytes: int
    activations_of_lora: float | None
    peak_bytes: int | None
    speed: float


@dataclass(frozen=True)
class Report:
    """One shape.

    Attributes:
        shape: Its name.
        device: The card's or processor's name.
        dtype: Of the weights.
        threads: Threads of the CPU.
        tokens: Tokens of a batch.
        layers: Adapted layers.
        frozen_seconds: Median of the frozen model's forward and backward.
        frozen_bytes: What autograd keeps for it.
        calibration_of_frozen: Median ratio of one calibration pass to it.
        bases_seconds: All calibration passes and the construction of the bases, once; None if not asked for.
        methods: By name.
    """

    shape: str
    device: str
    dtype: str
    threads: int
    tokens: int
    layers: int
    frozen_seconds: float
    frozen_bytes: int
    calibration_of_frozen: float
    bases_seconds: float | None
    methods: dict[str, Measured]


def measure(name: str, methods: Sequence[str], options: argparse.Namespace) -> Report:
    """All methods on one shape."""
    shape, device, dtype = SHAPES[name], torch.device(options.device), getattr(torch, options.dtype)
    examples = options.examples or (shape.cpu_examples if device.type == "cpu" else shape.examples)
    model, batch = build(shape, device, dtype, options.blocks), make_batch(shape, examples, device, dtype)
    giva = GivaConfig(rank=METHODS["giva"][1], target_modules=shape.targets)
    exclude = ["head"] if hasattr(model, "head") else []
    layers, ranks = layer_shapes(model, giva, exclude)

    def loss_fn(net: nn.Module, inputs: Batch) -> tuple[Tensor, int]:
        return net(**inputs), examples

    bases, bases_seconds = random_bases(layers, ranks), None
    if options.bases:
        started = time.perf_counter()
        try:
            bases = adapt.calibrate(model, [batch], loss_fn, giva, exclude=exclude)
            bases_seconds = time.perf_counter() - started
        except BasesError as error:  # few examples of a model with random weights: a gradient of low rank
            print(f"{name}: random bases instead of calibrated ones; {error}", file=sys.stderr)
    frozen = frozen_pass(model, layers, batch)
    [stage, *_] = calibration.stages(giva)
    multipliers = calibration.multipliers(stage, layers, ranks, giva, None)
    work: dict[str, Work] = {
        FLOOR: frozen,
        "calibration": lambda: sketch_pass(model, layers, multipliers, stage.side, [batch], loss_fn),
    }
    models, trained = {FLOOR: model}, {}
    for method in methods:
        add, rank = METHODS[method]
        adapted = add(sharing_copy(model), layers, bases, rank)
        models[method], work[method] = adapted, step(adapted, batch)
        head = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trained[method] = sum(p.numel() for p in adapted.parameters() if p.requires_grad) - head
    with FlopCounterMode(display=False) as counter:
        frozen()
    kept = {}
    for key in models:
        try:
            kept[key] = kept_bytes(work[key], models[key])
        except torch.OutOfMemoryError:
            print(f"{name}: {key} is left out, the memory does not suffice", file=sys.stderr)
            del work[key]
    peaks = {key: peak_bytes(run, device) for key, run in work.items()}
    seconds = in_turn(work, options.repeats, lambda run: _seconds(run, device))
    limit = product_speed(device, dtype)

    def ratio(key: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[key], seconds[to], strict=True))

    above = {key: kept[key] - kept[FLOOR] for key in methods if key in kept}
    found = {
        key: Measured(
            METHODS[key][1],
            trained[key],
            statistics.median(seconds[key]),
            ratio(key, REFERENCE) if REFERENCE in seconds else None,
            above[key],
            above[key] / above[REFERENCE] if REFERENCE in above else None,
            peaks[key],
            counter.get_total_flops() / statistics.median(seconds[key]) / limit,
        )
        for key in above
    }
    return Report(
        name,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        options.dtype,
        torch.get_num_threads(),
        tokens_of(shape, examples),
        len(layers),
        statistics.median(seconds[FLOOR]),
        kept[FLOOR],
        ratio("calibration", FLOOR),
        bases_seconds,
        found,
    )


# -- work -------------------------------------------------------------------------------------------------------------


def step(model: nn.Module, batch: Batch) -> Work:
    """One optimizer step on the batch."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run() -> Tensor:
        loss = model(**batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return run


def frozen_pass(model: nn.Module, layers: Sequence[LayerShape], batch: Batch) -> Work:
    """Forward, and backward as far as adapters ask for it: to the outputs of the first adapted layers."""
    modules = [model.get_submodule(layer.name) for layer in layers]

    def ask(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    def run() -> None:
        handles = [module.register_forward_hook(ask) for module in modules]
        try:
            model(**batch).backward()
        finally:
            for handle in handles:
                handle.remove()
            model.zero_grad()

    return run


# -- measures ---------------------------------------------------------------------------------------------------------


def kept_bytes(run: Work, model: nn.Module) -> int:
    """Bytes of what autograd keeps during `run`, each storage once, without the model's parameters and buffers."""
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # or a later tensor would be taken for an earlier one at the same place

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:  # autograd keeps views of weights too
            alive.append(tensor)
            storages[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storages.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(run: Work, device: torch.device) -> int | None:
    """Most bytes allocated during `run` above what was before; None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating operations a second of a large square product."""
    n = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(_seconds(lambda: left @ right, device) for _ in range(10))


def _seconds(run: Work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


# -- output -----------------------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """For people."""
    lines = [
        f"{report.shape}, {report.layers} layers, {report.tokens} tokens, {report.dtype}, {report.device}"
        + (f", {report.threads} thread(s)" if report.device == "CPU" else ""),
        f"{'':<14} {'trained':>10} {'ms':>8} {'of LoRA':>8} "
        f"{'activations':>12} {'of LoRA':>8} {'peak':>10} {'speed':>6}",
        f"{FLOOR:<14} {'':>10} {1e3 * report.frozen_seconds:>8.1f} {'':>8} {bytes_text(report.frozen_bytes):>12}",
    ]
    for name, found in report.methods.items():
        ratios = [f"{value:.2f}" if value is not None else "-" for value in (found.of_lora, found.activations_of_lora)]
        peak = bytes_text(found.peak_bytes) if found.peak_bytes is not None else "-"
        lines.append(
            f"{name + f' r={found.rank}':<14} {found.trained:>10,} {1e3 * found.step_seconds:>8.1f} {ratios[0]:>8} "
            f"{'+' + bytes_text(found.activation_bytes):>12} {ratios[1]:>8} {peak:>10} {found.speed:>6.2f}"
        )
    lines.append(f"one calibration pass: {report.calibration_of_frozen:.2f} x frozen")
    if report.bases_seconds is not None:
        lines.append(f"all calibration passes and bases: {report.bases_seconds:.1f} s")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minilm", "roberta-base"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["giva", "lora", "vera"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--examples", type=int, help="examples of a batch, instead of the shape's")
    parser.add_argument("--bases", action="store_true", help="time the whole calibration, and use its bases")
    parser.add_argument("--blocks", type=int, help="blocks of the model, instead of the shape's: a part of it, sooner")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each method that are timed")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each shape instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.shapes:
        print(f"{name}: building", file=sys.stderr)
        report = measure(name, options.methods, options)
        print(json.dumps(asdict(report)) if options.json else table(report) + "\n", flush=True)


if __name__ == "__main__":
    main()
