"""Bytes on the wire: every method and precision, for real models' shapes, calibration and head included.

    python benchmarks/wire.py
    python benchmarks/wire.py --models minilm --rounds 20 --sites 8 --json

No weights are needed: the models stand on the meta device, from their public configurations. What a site sends and
gets is counted from the run's own schema, sketch plan and packing; names, headers and scalars are those of a message as
Flower serialises it. Beside it stands what a site would send that sent its gradient.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from _configs import CONFIGS, GATED
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from giva_core import calibration, protocol
from giva_core.aggregate import round_factor
from giva_core.config import LORA_FAMILY, METHODS, RunConfig
from giva_core.packing import Payload
from giva_core.protocol import Hello
from giva_core.types import LayerShape, ModelSchema
from server.cli.result import bytes_text
from server.exchange import message_bytes, to_content

PRECISIONS = {"float32": 4, "float16": 2, "int8": 1}
ENCODER = {"giva.rank": 8, "lora.rank": 8, "vera.rank": 256, "randlora.rank": 32}
DECODER = {"giva.rank": 64, "lora.rank": 16, "vera.rank": 1024, "randlora.rank": 32}


@dataclass(frozen=True)
class Model:
    """What is counted of a model in `CONFIGS`.

    Attributes:
        auto: transformers' automatic class, whose weights `full` trains.
        settings: Ranks.
        targets: Adapted layers; the paper's.
        outputs: Classes of the head; 0 for a language model, which has none of its own.
    """

    auto: str
    settings: dict[str, int]
    targets: str | tuple[str, ...] = "all-linear"
    outputs: int = 0


MODELS = {
    "minilm": Model("AutoModel", ENCODER, outputs=18),
    "roberta-base": Model("AutoModel", ENCODER, outputs=18),
    **{name: Model("AutoModelForCausalLM", DECODER, GATED) for name in ("qwen2-0.5b", "llama-3.2-3b", "olmo2-7b")},
}


@dataclass(frozen=True)
class Row:
    """One method in one precision on one model; bytes of one site.

    Attributes:
        model: Name of the model.
        method: The method; `lora-xs/gradient` has the federation's bases, `giva/random` those of the seed alone.
        precision: As `wire.precision`.
        numbers_up: Trained numbers that a round sends up, the head among them; the mean over rounds.
        round_up: Bytes of a round's update, the mean over rounds.
        round_down: Bytes of a round's broadcast, the mean over rounds.
        calibration: Bytes of calibration and bases, both ways.
        run: Bytes of a whole run, both ways: joining, calibration, all rounds, the last evaluation.
        start: Bytes of the starting values that one of the sites sends once; not in `run`.
        of_gradient: `round_up` as a share of the adapted layers' gradient in float32.
    """

    model: str
    method: str
    precision: str
    numbers_up: float
    round_up: float
    round_down: float
    calibration: int
    run: int
    start: int
    of_gradient: float


@dataclass(frozen=True)
class Report:
    """Everything counted; gradients and weights in bytes of float32, by model."""

    rounds: int
    sites: int
    gradient_bytes: dict[str, int]
    weight_bytes: dict[str, int]
    rows: list[Row]


@dataclass(frozen=True)
class Shapes:
    """What a model on the meta device tells: its adapted layers, its head, and the shapes of all else."""

    layers: tuple[LayerShape, ...]
    head: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[int, ...]]


def read_shapes(name: str) -> Shapes:
    """The shapes of a model that is never allocated."""
    import torch
    import transformers

    from giva_core.config import GivaConfig
    from giva_core.inject import layer_shapes

    model, (kind, values) = MODELS[name], CONFIGS[name]
    config = getattr(transformers, kind)(**values)
    options = {"add_pooling_layer": False} if model.auto == "AutoModel" else {}
    with torch.device("meta"):
        made = getattr(transformers, model.auto).from_config(config, **options)
    layers, _ = layer_shapes(made, GivaConfig(rank=1, target_modules=model.targets))
    head: dict[str, tuple[int, ...]] = {}
    if model.outputs:
        head = {"classifier.weight": (model.outputs, config.hidden_size), "classifier.bias": (model.outputs,)}
    return Shapes(layers, head, {name: tuple(p.shape) for name, p in made.named_parameters()})


# -- counting ---------------------------------------------------------------------------------------------------------


def schema_of(config: RunConfig, shapes: Shapes) -> ModelSchema:
    """What a run of this method trains and sends, from shapes alone."""
    init = config.bases.init
    ranks = tuple(layer.effective_rank(config.giva.rank, init) for layer in shapes.layers)
    if config.has_bases:
        form = "core" if config.method == "lora-xs" else "vectors"
        return ModelSchema(shapes.layers, ranks, shapes.head, form=form)
    own: dict[str, tuple[int, ...]] = {}
    if config.method == "full":
        own = dict(shapes.weights)
    else:
        for layer, r in zip(shapes.layers, ranks, strict=True):
            own.update({f"{layer.name}.{name}": shape for name, shape in _arrays(config, layer, r).items()})
    return ModelSchema((), (), {**own, **shapes.head}, tuple(own))


def _arrays(config: RunConfig, layer: LayerShape, r: int) -> dict[str, tuple[int, ...]]:
    """Shape by name of what the method trains in one layer."""
    d_out, d_in = layer.d_out, layer.d_in
    small = min(d_out, d_in)
    bases = math.ceil(small / config.randlora.rank)
    lora_A = {"lora_A.default.weight": (config.lora.rank, d_in)}
    lora_B = {"lora_B.default.weight": (d_out, config.lora.rank)}
    known: dict[str, dict[str, tuple[int, ...]]] = {
        **{name: {**lora_A, **lora_B} for name in LORA_FAMILY},
        "ffa-lora": lora_B,
        "vera": {"vera_lambda_b.default": (d_out,), "vera_lambda_d.default": (config.vera.rank,)},
        "randlora": {
            "randlora_lambda.default": (config.randlora.rank, bases),
            "randlora_gamma.default": (bases, small),
        },
        "osora": {"lambda_o": (d_out,), "lambda_s": (r,)},
        "lora-xs": {"core": (r, r)},
        "head": {},
    }
    return known[config.method]


def count(model: str, method: str, precision: str, rounds: int, sites: int, shapes: Shapes) -> Row:
    """Count one row of the table."""
    name, _, bases = method.partition("/")
    settings = {"method": name, "wire.precision": precision, "rounds.num-rounds": rounds, **MODELS[model].settings}
    config = RunConfig.from_flat({**settings, **({f"{name.replace('-', '_')}.bases": bases} if bases else {})})
    schema = schema_of(config, shapes)
    digest = "d" * 64 if config.has_bases else ""
    numbers, up, down = [], [], []
    for number in range(1, rounds + 2):  # the last state travels once more, to be evaluated
        columns = (number - 1) * (sites + 1) * config.lora.rank if config.method == "fedex-lora" else 0
        sent = protocol.global_shapes(schema, digest, columns)
        down.append(_packed(sent, precision) + _envelope(precision, down=True))
        if number > rounds:
            break
        trained = {n: sent[n] for n in protocol.trained_names(schema, round_factor(config, number), digest)}
        numbers.append(_numbers(trained))
        up.append(_packed(trained, precision) + _envelope(precision, down=False))
    calibrated = _calibration(config, schema) if config.is_calibrated else 0
    return Row(
        model=model,
        method=method,
        precision=precision,
        numbers_up=sum(numbers) / rounds,
        round_up=sum(up) / rounds,
        round_down=sum(down[:rounds]) / rounds,
        calibration=calibrated,
        run=_joining(schema) + calibrated + sum(up) + sum(down),
        start=4 * _numbers(schema.state),
        of_gradient=sum(up) / rounds / gradient_bytes(shapes),
    )


def gradient_bytes(shapes: Shapes) -> int:
    """The adapted layers' gradient in float32."""
    return 4 * sum(layer.d_out * layer.d_in for layer in shapes.layers)


def _numbers(shapes: dict[str, tuple[int, ...]] | Any) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _packed(shapes: dict[str, tuple[int, ...]], precision: str) -> int:
    return PRECISIONS[precision] * _numbers(shapes) + (4 * len(shapes) if precision == "int8" else 0)


def _serialised(payload: Payload) -> int:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return message_bytes(Message(to_content(payload), 2**62, protocol.ROUND, ttl=3600.0, group_id="train-10"))


def _envelope(precision: str, *, down: bool) -> int:
    """What a message has beside its packed numbers: names, array headers, scalars."""
    arrays = {"state": np.zeros(0, np.float32), **({"scales": np.zeros(0, np.float32)} if precision == "int8" else {})}
    values: dict[str, Any] = {} if precision == "float32" else {"digest": "d" * 64}
    if down:
        values.update({"bases": "d" * 64, "residual": 0, "server-round": 9, "total-rounds": 10, "factor": "both"})
        values.update({"proximal-mu": 0.0, "evaluate": True, **({"run": "r" * 20} if precision == "int8" else {})})
    else:
        values.update({"num-examples": 999, "num-steps": 99, "train-loss": 0.5, "bases": "d" * 64, "seconds": 1.5})
    return _serialised(Payload(arrays, values))


def _joining(schema: ModelSchema) -> int:
    """Hello, both ways."""
    d = "d" * 64
    hello = Hello("hospital-a", 9999, 999, schema, d, d, d, versions="v" * 90, device="cpu", frozen_digest=d)
    question = Payload(values={"config": d, "protocol": protocol.PROTOCOL_VERSION})
    return _serialised(hello.to_payload()) + _serialised(question)


def _calibration(config: RunConfig, schema: ModelSchema) -> int:
    """All passes and the bases' message, both ways: codes and exponents, and the head that is calibrated with."""
    giva = config.bases
    width = {8: 1, 12: 2, 16: 2, 20: 4}[giva.sketch_bits]

    def sketch(stage: calibration.Stage) -> int:
        sizes = calibration.sketch_shapes(stage, schema.layers, schema.ranks, giva).values()
        return sum(width * n * q + 2 * q for n, q in sizes)

    head, plan = 4 * _numbers(schema.state), calibration.stages(giva)
    before = [0, *(sketch(stage) for stage in plan[:-1])]
    passes = sum(sketch(stage) + previous + head for stage, previous in zip(plan, before, strict=True))
    last_right = [stage for stage in plan if stage.side == "output"][-1]
    message = sketch(last_right) + (sketch(plan[-1]) if plan[-1].name == "coordinates" else 0)
    return passes + message + (len(plan) * 2 + 1) * _envelope("float32", down=True)


def measure(models: Sequence[str], rounds: int, sites: int) -> Report:
    """Count every method in every precision."""
    middle = METHODS[METHODS.index("giva") + 1 : METHODS.index("lora-xs") + 1]
    methods = ["giva", "giva/random", *middle, "lora-xs/gradient", "full", "head"]
    found = {name: read_shapes(name) for name in models}
    rows = [
        count(model, method, precision, rounds, sites, found[model])
        for model in models
        for method in methods
        for precision in PRECISIONS
    ]
    gradients = {name: gradient_bytes(shapes) for name, shapes in found.items()}
    weights = {name: 4 * _numbers(shapes.weights) for name, shapes in found.items()}
    return Report(rounds, sites, gradients, weights, rows)


def paper_fedex_down(model: str, sites: int, shapes: Shapes) -> int:
    """A round's broadcast to sites that keep earlier residuals, as in the paper: factors of rank K r, and A and B."""
    rank = MODELS[model].settings["lora.rank"]
    return 4 * sum((sites + 1) * rank * (layer.d_out + layer.d_in) for layer in shapes.layers)


def table(report: Report) -> str:
    """For people."""
    lines = []
    for model, gradient in report.gradient_bytes.items():
        settings = ", ".join(f"{key} {value}" for key, value in MODELS[model].settings.items())
        lines += [
            f"{model}: {settings}; {report.rounds} rounds, {report.sites} sites",
            f"  gradient of the adapted layers {bytes_text(gradient)}, all weights "
            f"{bytes_text(report.weight_bytes[model])}, in float32",
            f"  {'a site':<18} {'numbers up':>13} {'up, a round: float32':>21} {'float16':>10} {'int8':>10} "
            f"{'down: float32':>14} {'calibration':>12} {'run: float32':>13} {'int8':>10} {'up/gradient':>12}",
        ]
        by_method: dict[str, dict[str, Row]] = {}
        for row in report.rows:
            if row.model == model:
                by_method.setdefault(row.method, {})[row.precision] = row
        for method, rows in by_method.items():
            plain, small = rows["float32"], rows["int8"]
            lines.append(
                f"  {method:<18} {plain.numbers_up:>13,.0f} {bytes_text(round(plain.round_up)):>21} "
                f"{bytes_text(round(rows['float16'].round_up)):>10} {bytes_text(round(small.round_up)):>10} "
                f"{bytes_text(round(plain.round_down)):>14} "
                f"{bytes_text(plain.calibration) if plain.calibration else '-':>12} {bytes_text(plain.run):>13} "
                f"{bytes_text(small.run):>10} {plain.of_gradient:>12.5f}"
            )
        fedex = paper_fedex_down(model, report.sites, read_shapes(model))
        lines += [f"  fedex-lora down, were sites to keep earlier residuals: {bytes_text(fedex)} a round", ""]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sites", type=int, default=4, help="sites in a round: fedex-lora's residual grows with them")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the tables")
    options = parser.parse_args()
    report = measure(options.models, options.rounds, options.sites)
    print(json.dumps(asdict(report)) if options.json else table(report))


if __name__ == "__main__":
    main()
