"""Does the basis matter? GiVA with A from the gradient, with A from the seed, and with B aligned, each at its own rate.

    python benchmarks/basis.py --study rank       1,000 medical questions at one place, r = 1, 8, 64
    python benchmarks/basis.py --study data       300 and 3,000 questions, r = 8
    python benchmarks/basis.py --study head       1,000, calibrated without head rounds before, r = 8
    python benchmarks/basis.py --study answers    a language model that writes answers, three sites, r = 8
    python benchmarks/basis.py --study rank answers --plot basis.png
    python benchmarks/basis.py --study energy     how much of the gradient A holds, at the start and after training

The loss on the validation rows after an eighth, a half and all of the run (answers: a half and all); every line is at
the rate of its grid with the lowest loss at the end of seed 0, and further seeds are run at that rate alone. Runs are
kept and found as in `accuracy.py`. The plot has the last loss against the rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from _federated import Dataset, Job, build_bases, finished, judged, run_all
from accuracy import DATASETS

from client.site import site_settings
from client.trainer import LocalTrainer
from giva_core.sketch import sketch_pass
from server.run_store import RunStore, default_root

MEDICAL = DATASETS["medical"]
SMALL = replace(MEDICAL, examples=1000)
ANSWERS = Dataset(
    "answers",
    600,
    {
        "train.precision": "bfloat16",
        "rounds.num-rounds": 6,
        "rounds.evaluate-every": 3,
        "train.max-local-steps": 4,
        "giva.target-modules": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    },
)
#: Where in a run to look, by task; a look at the language model's answers takes minutes.
SHARES = {"medical": (1 / 8, 1 / 2, 1), "answers": (1 / 2, 1)}
#: Settings by name of what is compared, and the grid of its rates at r = 8.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "gradient": ({}, (0.02, 0.05, 0.1)),
    "random": ({"giva.bases": "random"}, (0.05, 0.1, 0.2)),
    "rowalign": ({"giva.init": "rowalign"}, (0.003, 0.01, 0.03)),
}


#: Label, colour and mark in the plot.
PLOTTED = {
    "gradient": ("A from the gradient", "#0b6e4f", "o"),
    "random": ("A from the seed", "#555555", "s"),
    "rowalign": ("row-aligned B", "#c77d0a", "^"),
}


@dataclass(frozen=True)
class Case:
    """One situation in which the variants are compared.

    Attributes:
        label: What it is.
        dataset: The task.
        settings: Beside the dataset's.
        central: Whether all rows lie at one place.
        scale: Factor of the rates; orthonormal columns of B have rows of norm √(r / d_out), and a rate acts on their
            product.
        rates: Grids in the place of `VARIANTS`'.
    """

    label: str
    dataset: Dataset
    settings: Mapping[str, Any]
    central: bool = True
    scale: float = 1.0
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def _ranked(rank: int, scale: float) -> Case:
    return Case(f"r = {rank}", SMALL, {"giva.rank": rank}, scale=scale)


#: The few steps of the language model ask for more than the encoder's rates.
ANSWERS_RATES = {"gradient": (0.05, 0.1, 0.2, 0.4), "random": (0.1, 0.2, 0.4, 0.8)}
STUDIES: dict[str, tuple[Case, ...]] = {
    "rank": (_ranked(1, 3.0), _ranked(8, 1.0), _ranked(64, 0.4)),
    "data": tuple(Case(f"{n} questions", replace(MEDICAL, examples=n), {}) for n in (300, 3000)),
    "head": (Case("no head rounds", SMALL, {"rounds.head-rounds": 0}),),
    "answers": (Case("language model", ANSWERS, {}, central=False, rates=ANSWERS_RATES),),
}


@dataclass(frozen=True)
class Line:
    """One variant in one case at one rate: the loss on the validation rows along the run."""

    case: str
    variant: str
    seed: int
    rate: float
    losses: tuple[float, ...]
    metric: float


def jobs_of(case: Case, variants: Iterable[str]) -> list[Job]:
    """Every variant at every rate of its grid, on seed 0."""
    jobs = []
    for variant in variants:
        settings, rates = VARIANTS[variant]
        for rate in case.rates.get(variant, rates):
            flat = {**case.settings, **settings, "train.learning-rate": round(rate * case.scale, 4)}
            jobs.append(Job(f"basis-{variant}", case.dataset, 0, flat, case.central))
    return jobs


def losses_of(job: Job) -> tuple[tuple[float, ...], float]:
    """Validation loss along the run, and accuracy (of tokens) at the end."""
    total = job.config().rounds.num_rounds
    found = [judged(job, max(1, round(share * total))) for share in SHARES[job.dataset.name]]
    metrics = found[-1][0]
    metric = metrics.get("accuracy", metrics.get("token_accuracy", float("nan")))
    return tuple(loss for _, loss in found), metric


def measure(studies: Sequence[str], variants: Sequence[str], seeds: int, processes: int) -> list[Line]:
    """All lines of the studies: at all rates on seed 0, at the best of these on the others."""
    places = [(case, job) for study in studies for case in STUDIES[study] for job in jobs_of(case, variants)]
    tuned = _lines(places, processes)
    job_of = {line: place for line, place in zip(tuned, places, strict=True)}
    chosen = [job_of[line] for line in best_of(tuned).values()]
    again = [(case, replace(job, seed=seed)) for seed in range(1, seeds) for case, job in chosen]
    return tuned + _lines(again, processes)


def _lines(places: Sequence[tuple[Case, Job]], processes: int) -> list[Line]:
    found = run_all(losses_of, [job for _, job in places], processes)
    return [
        Line(
            case.label,
            job.row.removeprefix("basis-"),
            job.seed,
            float(job.settings["train.learning-rate"]),
            losses,
            metric,
        )
        for (case, job), (losses, metric) in zip(places, found, strict=True)
    ]


def best_of(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """The line of seed 0 with the lowest last loss, by case and variant."""
    found: dict[tuple[str, str], Line] = {}
    for line in lines:
        place = line.case, line.variant
        if line.seed == 0 and (place not in found or line.losses[-1] < found[place].losses[-1]):
            found[place] = line
    return found


def table(lines: Sequence[Line]) -> str:
    """Case by case, every variant at its best rate, and its loss against A from the gradient, seed by seed."""
    rows = [
        f"{'':<18} {'A, B':<10} {'rate':>7} {'loss along the run, to its end':>32} {'accuracy':>9}  against gradient"
    ]
    chosen = best_of(lines)
    for label in dict.fromkeys(line.case for line in lines):
        best = {
            variant: [line for line in lines if (line.case, line.variant, line.rate) == (label, variant, one.rate)]
            for (case, variant), one in chosen.items()
            if case == label
        }
        for variant, items in best.items():
            means = [statistics.fmean(item.losses[k] for item in items) for k in range(len(items[0].losses))]
            pairs = [mine.losses[-1] - other.losses[-1] for mine, other in zip(items, best["gradient"], strict=True)]
            against = "" if variant == "gradient" else "  ".join(f"{value:+.4f}" for value in pairs)
            rows.append(
                f"{label:<18} {variant:<10} {items[0].rate:>7g} {'  '.join(f'{mean:.4f}' for mean in means):>32} "
                f"{statistics.fmean(item.metric for item in items):>9.4f}  {against}".rstrip()
            )
    return "\n".join(rows)


def plot(lines: Sequence[Line], path: Path) -> None:
    """The last loss above the lowest of its case, against the rate, on seed 0; a panel for each case, one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    cases = list(dict.fromkeys(line.case for line in lines))
    figure = Figure(figsize=(3.2 * len(cases), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axes, case in zip(panels, cases, strict=True):
        lowest = min(line.losses[-1] for line in lines if line.case == case and line.seed == 0)
        for variant, (label, colour, marker) in PLOTTED.items():
            of_variant = [line for line in lines if (line.case, line.variant, line.seed) == (case, variant, 0)]
            if mine := sorted((line.rate, line.losses[-1] - lowest) for line in of_variant):
                axes.plot(*zip(*mine, strict=True), color=colour, marker=marker, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({o.rate for o in lines if o.case == case})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.tick_params("x", rotation=90)
        axes.set(title=f"{case}, lowest {lowest:.3f}", xlabel="learning rate")
    figure.axes[0].set_ylabel("validation loss above the lowest")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


# -- energy -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Energy:
    """The share `‖G Aᵀ‖² / ‖G‖²` of the gradient that A holds after a training round: over the layers, all and each.

    G is the mean gradient of validation questions, whole.
    """

    variant: str
    round: int
    total: float
    median: float
    lowest: float


def energies(rounds: Sequence[int], batches: int = 8) -> list[Energy]:
    """How much of the gradient the bases hold, before the first round (0) and later."""
    found = []
    for variant, rate in (("gradient", 0.05), ("random", 0.2)):
        settings = {**VARIANTS[variant][0], "train.learning-rate": rate}
        job = Job(f"basis-{variant}", SMALL, 0, settings, central=True)
        config, store = job.config(), RunStore(default_root())
        run_id = finished(job, config, store)
        site = site_settings(config, {"partition-id": 0})
        other = config.replace(giva__calibration_batches=batches, data__train_file="validation.jsonl")
        feed = LocalTrainer(site_settings(other, {"partition-id": 0}), other.replace(giva__calibration_batch_size=32))
        trainer = LocalTrainer(site, config)
        digest = build_bases(trainer, store, run_id)
        held, layers = trainer.backbone.bases(digest), trainer.schema.layers
        whole = {layer.name: np.eye(layer.d_in, dtype=np.float32) for layer in layers}
        task = trainer.backbone.task

        def summed(_: Any, batch: dict[str, Any], task: Any = task) -> tuple[Any, int]:
            return task.task_loss(task.forward(batch), batch["labels"], reduction="sum"), len(batch["labels"])

        for number in rounds:
            state = store.state(run_id, *(("train", number) if number else ("head", config.rounds.head_rounds)))
            trainer.backbone.use(digest if number else "")
            trainer.backbone.write(state.arrays)
            made = sketch_pass(task.model, layers, whole, "input", feed.calibration_batches(), summed).arrays
            inside = [float(np.sum(np.square(made[layer.name] @ held.layers[layer.name].A.T))) for layer in layers]
            all_of_it = [float(np.sum(np.square(made[layer.name]))) for layer in layers]
            shares = [part / total for part, total in zip(inside, all_of_it, strict=True)]
            share = sum(inside) / sum(all_of_it)
            found.append(Energy(variant, number, share, statistics.median(shares), min(shares)))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", nargs="+", choices=[*STUDIES, "energy"], default=["rank"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--plot", type=Path, help="a PNG of the last loss against the rate")
    parser.add_argument("--json", action="store_true", help="one line of JSON with all rates instead of the table")
    options = parser.parse_args()
    if "energy" in options.study:
        if len(options.study) > 1:
            parser.error("energy is a study of its own")
        shares = energies((0, 1, 4, 8))
        if options.json:
            print(json.dumps([asdict(item) for item in shares]))
            return
        print(f"{'A':<10} {'round':>5} {'of all':>8} {'median layer':>13} {'lowest':>8}")
        for item in shares:
            print(f"{item.variant:<10} {item.round:>5} {item.total:>8.3f} {item.median:>13.3f} {item.lowest:>8.3f}")
        return
    variants = list(dict.fromkeys(["gradient", *options.variants]))
    lines = measure(options.study, variants, options.seeds, options.jobs)
    if options.plot:
        plot(lines, options.plot)
    print(json.dumps([asdict(line) for line in lines]) if options.json else table(lines))


if __name__ == "__main__":
    main()
