"""Accuracy for bytes: every method at its own learning rate, bases from elsewhere, inits, modes, and wire precisions.

    python benchmarks/accuracy.py                            federated and central GiVA, LoRA, head, TF-IDF + SVM
    python benchmarks/accuracy.py --rows methods --seeds 3   one group: methods, bases, inits, modes, wire; or all
    python benchmarks/accuracy.py --rows methods --tune      the learning rates, on the validation rows of seed 0
    python benchmarks/accuracy.py --task sentiment           four natural sites instead of the medical questions
    python benchmarks/accuracy.py --examples 1500            fewer training questions; 0: all

Medical: question to subject, 3,000 training questions at four sites, Dirichlet(0.5). Sentiment: tweets, film and
product reviews, editorials, 1,000 training texts at each. Runs see training and validation rows; the test rows are
looked at once, with a finished run's last state. bfloat16 products, as on a GPU (`--set train.precision=float32` where
the processor has none). An interrupted benchmark goes on where it was: `_federated.py` says how.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from _federated import Dataset, Job, Outcome, bytes_to, outcome, run_all

from giva_core.config import parse_assignments
from server.cli.result import bytes_text

LONGER = {"rounds.evaluate-every": 100, "train.precision": "bfloat16"}
DATASETS = {
    "medical": Dataset(
        "medical",
        3000,
        {**LONGER, "rounds.head-rounds": 10, "rounds.num-rounds": 8, "train.local-epochs": 0.375},
    ),
    "sentiment": Dataset(
        "sentiment",
        1000,
        {**LONGER, "rounds.head-rounds": 4, "rounds.num-rounds": 4, "train.local-epochs": 0.25},
    ),
}
#: A run reaches its mark where its accuracy on the validation rows is this share of central GiVA's.
MARK = 0.95


@dataclass(frozen=True)
class Row:
    """A row of the table: its settings beside the dataset's, the grid of `--tune`, and what else a `Job` has."""

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    central: bool = False
    bases_of: str = ""


def _rated(label: str, rates: tuple[float, ...], **settings: Any) -> Row:
    return Row(label, settings, {"train.learning-rate": rates})


GIVA_RATES = (0.02, 0.05, 0.1)
LORA_RATES = (1e-3, 2e-3, 4e-3)
ROWS = {
    "giva": _rated("GiVA r=8", GIVA_RATES),
    "giva-central": replace(_rated("GiVA r=8, all data at one place", GIVA_RATES), central=True),
    "lora": _rated("LoRA r=8", LORA_RATES, method="lora"),
    "ffa-lora": _rated("FFA-LoRA r=8", (2e-3, 4e-3, 8e-3, 1.6e-2), method="ffa-lora"),
    "rolora": _rated("RoLoRA r=8", (*LORA_RATES, 8e-3), method="rolora"),
    "fedex-lora": _rated("FedEx-LoRA r=8", (*LORA_RATES, 8e-3), method="fedex-lora"),
    "vera": _rated("VeRA r=256", (0.02, 0.05, 0.1, 0.2), method="vera"),
    "osora": _rated("OSoRA r=8", (0.02, 0.05, 0.1, 0.2), method="osora"),
    "randlora": _rated("RandLoRA r=32", (1e-4, 5e-4, 2e-3), method="randlora"),
    "lora-xs": _rated("LoRA-XS r=8, bases of the weight", (1e-3, 5e-3, 2e-2, 5e-2), method="lora-xs"),
    "fed-sb": _rated(
        "LoRA-XS r=8, federated bases", (2e-3, 5e-3, 2e-2, 5e-2), method="lora-xs", **{"lora_xs.bases": "gradient"}
    ),
    "full": _rated("all weights", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), method="full"),
    "head": Row(
        "frozen encoder, head alone",
        {"method": "head", "rounds.head-rounds": 0, "rounds.num-rounds": 20, "train.local-epochs": 1.0},
        {"train.head-learning-rate": (1e-3, 2e-3, 5e-3, 1e-2), "train.head-epsilon": (1e-8, 1e-2)},
    ),
    # random rows take up less of the inputs, and unit rows of B more than orthonormal columns: the rates follow
    "giva-random": _rated("A from the seed, not calibrated", (0.05, 0.1, 0.2), **{"giva.bases": "random"}),
    "giva-one-site": replace(_rated("A from one site's gradient", GIVA_RATES), bases_of="one-site"),
    "giva-pooled": replace(_rated("A from the pooled data's gradient", GIVA_RATES), bases_of="pooled"),
    **{
        f"giva-{init}": _rated(f"B: {init}", rates, **{"giva.init": init})
        for init, rates in (("topsv", GIVA_RATES), ("secsv", GIVA_RATES), ("rowalign", (0.003, 0.01, 0.03)))
    },
    **{f"giva-{mode}": _rated(f"mode {mode}", GIVA_RATES, **{"rounds.mode": mode}) for mode in ("alternate", "exact")},
    **{
        f"{method}-{precision}": _rated(f"{label}, {precision}", rates, method=method, **{"wire.precision": precision})
        for method, label, rates in (("giva", "GiVA r=8", GIVA_RATES), ("lora", "LoRA r=8", LORA_RATES))
        for precision in ("float16", "int8")
    },
}
GROUPS = {
    "baselines": ("giva", "giva-central", "lora", "head", "svm"),
    "methods": (
        *("giva", "giva-central", "lora", "ffa-lora", "rolora", "fedex-lora", "vera", "osora", "randlora"),
        *("lora-xs", "fed-sb", "full", "head", "svm"),
    ),
    "bases": ("giva", "giva-one-site", "giva-pooled", "giva-random"),
    "inits": ("giva", "giva-topsv", "giva-secsv", "giva-rowalign"),
    "modes": ("giva", "giva-alternate", "giva-exact"),
    "wire": ("giva", "giva-float16", "giva-int8", "lora", "lora-float16", "lora-int8"),
}
GROUPS["all"] = tuple(dict.fromkeys(itertools.chain.from_iterable(GROUPS.values())))
#: The best of each grid by accuracy on the validation rows of seed 0, as `--tune` prints them; else the middle.
TUNED: dict[str, dict[str, dict[str, Any]]] = {
    "medical": {
        "giva": {"train.learning-rate": 0.05},
        "giva-random": {"train.learning-rate": 0.1},
        "lora": {"train.learning-rate": 2e-3},
        "ffa-lora": {"train.learning-rate": 8e-3},
        "rolora": {"train.learning-rate": 4e-3},
        "fedex-lora": {"train.learning-rate": 4e-3},
        "vera": {"train.learning-rate": 0.1},
        "osora": {"train.learning-rate": 0.1},
        "randlora": {"train.learning-rate": 5e-4},
        "lora-xs": {"train.learning-rate": 2e-2},
        "fed-sb": {"train.learning-rate": 5e-3},
        "full": {"train.learning-rate": 3e-4},
        "head": {"train.head-learning-rate": 5e-3, "train.head-epsilon": 1e-2},
    },
    "sentiment": {
        "giva": {"train.learning-rate": 0.02},
        "giva-random": {"train.learning-rate": 0.2},
        "lora": {"train.learning-rate": 1e-3},
        "ffa-lora": {"train.learning-rate": 8e-3},
        "rolora": {"train.learning-rate": 4e-3},
        "fedex-lora": {"train.learning-rate": 2e-3},
        "vera": {"train.learning-rate": 0.1},
        "osora": {"train.learning-rate": 0.05},
        "randlora": {"train.learning-rate": 5e-4},
        "lora-xs": {"train.learning-rate": 5e-2},
        "fed-sb": {"train.learning-rate": 5e-3},
        "head": {"train.head-learning-rate": 2e-3, "train.head-epsilon": 1e-8},
    },
}


def tuned(task: str, name: str) -> Mapping[str, Any]:
    """The row's rates; a row whose own were not searched has those of its method, if the grid is the same one."""
    known, row = TUNED[task], ROWS[name]
    method = str(row.settings.get("method", "giva"))
    if name in known or (method in known and ROWS[method].grid == row.grid):
        return known.get(name) or known[method]
    return {key: values[len(values) // 2] for key, values in row.grid.items()}


def job(name: str, task: str, examples: int | None, seed: int, settings: Mapping[str, Any]) -> Job:
    """A row as a run."""
    row, dataset = ROWS[name], DATASETS[task]
    if examples is not None:
        dataset = replace(dataset, examples=examples)
    return Job(name, dataset, seed, {**row.settings, **settings}, row.central, row.bases_of)


def svm_outcome(dataset: Dataset, seed: int) -> Outcome:
    """TF-IDF over words and word pairs, and a linear SVM, on the pooled rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    folder = dataset.folder(seed) / "pooled"
    (texts, labels), (test_texts, test_labels) = (_rows(folder / f"{name}.jsonl") for name in ("train", "test"))
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC(C=0.5)).fit(texts, labels)
    found = model.predict(test_texts)
    f1 = f1_score(test_labels, found, average="macro")
    accuracy = accuracy_score(test_labels, found)
    return Outcome("svm", seed, "test.jsonl", accuracy, f1, None, None, 0, 0, 0.0, None, None, {}, "")


def _rows(path: Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


# -- tables -----------------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome], marks: Mapping[tuple[str, int], int | None]) -> str:
    """Mean ± standard deviation over the seeds, row by row; bytes and aggregation errors are those of seed 0."""
    header = f"{'row':<34} {'accuracy':>15} {'macro-F1':>15} {'worst site':>15} {'up/site/round':>13} {'run':>9} "
    lines = [f"{header}{f'to {MARK:.0%}':>13} {'agg. error':>12} {'s/step':>7}"]
    for name, items in _by_row(outcomes).items():
        central = name == "svm" or ROWS[name].central
        found = [marks.get((name, item.seed)) for item in items]
        reached = [value for value in found if value is not None]
        mark = f"{bytes_text(round(statistics.median(reached)))}" if reached else "never"
        mark += f" ({len(reached)}/{len(found)})" if reached and len(reached) < len(found) else ""
        first, last = items[0].first_error, items[0].last_error
        total = items[0].total_bytes
        cells = (
            f"{_spread([i.worst_accuracy or 0.0 for i in items]):>15} {bytes_text(round(items[0].round_bytes_up)):>13} "
            f"{'' if total is None else bytes_text(total):>9} {mark if (name, items[0].seed) in marks else '':>13} "
            f"{'' if first is None or last is None else f'{first:.1%}, {last:.1%}':>12} "
            f"{statistics.median([i.step_seconds for i in items]):>7.3f}"
        )
        label = "TF-IDF + linear SVM, pooled" if name == "svm" else ROWS[name].label
        accuracy, f1 = (_spread([getattr(i, key) for i in items]) for key in ("accuracy", "macro_f1"))
        lines.append(f"{label:<34} {accuracy:>15} {f1:>15} {'' if central else cells}".rstrip())
    return "\n".join(lines)


def _by_row(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for item in outcomes:
        found.setdefault(item.row, []).append(item)
    return found


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ± {statistics.stdev(values):.4f}"


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Accuracy against all bytes of the run; a bar is the range over the seeds, the line the frozen encoder's head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = [
        (items[0].total_bytes / 2**20, name, [item.accuracy for item in items])
        for name, items in _by_row(outcomes).items()
        if name not in ("svm", "giva-central") and items[0].total_bytes is not None
    ]
    for spent, name, values in shown:
        mean, low, high = statistics.fmean(values), min(values), max(values)
        colour = "#0b6e4f" if name.startswith("giva") else "#555555"
        axes.errorbar(spent, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=2, lw=1)
        others = [(abs(math.log(one[0] / spent)), max(one[2])) for one in shown if one[1] != name]
        above = not others or high > min(others)[1]  # than the nearest: the two have their names at different ends
        at, align = ((spent, high), "bottom") if above else ((spent, low), "top")
        shift = (0, 3 if above else -3)
        axes.annotate(name, at, shift, textcoords="offset points", fontsize=8, ha="center", va=align)
    for name, style in (("giva-central", "--"), ("svm", ":")):
        if items := _by_row(outcomes).get(name, []):
            mean = statistics.fmean([item.accuracy for item in items])
            axes.axhline(mean, color="#999999", ls=style, lw=1)
            label = "central GiVA" if name == "giva-central" else "TF-IDF + SVM"
            axes.annotate(label, (0.99, mean), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="all bytes of the run, MiB", ylabel="test accuracy")
    figure.savefig(path, dpi=150)


# -- the command ------------------------------------------------------------------------------------------------------


def tuning(names: Iterable[str], options: argparse.Namespace, settings: Mapping[str, Any]) -> list[Job]:
    """Every point of every row's grid, on seed 0."""
    jobs = []
    for name in names:
        grid = ROWS[name].grid
        for point in itertools.product(*grid.values()):
            at = {**settings, **dict(zip(grid, point, strict=True))}
            jobs.append(job(name, options.task, options.examples, 0, at))
    return jobs


def marks_of(jobs: Sequence[Job], outcomes: Sequence[Outcome], processes: int) -> dict[tuple[str, int], int | None]:
    """Bytes to `MARK` of central GiVA, by row and seed; empty where central GiVA is not among the jobs."""
    places = [(one.row, one.seed) for one in jobs]
    by_place = dict(zip(places, jobs, strict=True))
    found: dict[tuple[str, int], int | None] = {}
    for seed in sorted({one.seed for one in jobs}):
        if (central := by_place.get(("giva-central", seed))) is None:
            continue
        target = MARK * outcome(central, "validation.jsonl").accuracy
        asked = [one for one in jobs if one.seed == seed and not one.central]
        reached = run_all(functools.partial(bytes_to, accuracy=target), asked, processes)
        found.update({(one.row, seed): spent for one, spent in zip(asked, reached, strict=True)})
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=DATASETS, default="medical")
    parser.add_argument("--examples", type=int, help="training examples: in all, or of each natural site; 0: all")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[*GROUPS, *ROWS, "svm"],
        default=["baselines"],
        metavar="ROW",
        help="rows or groups",
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0")
    parser.add_argument("--tune", action="store_true", help="search the rates on the validation rows")
    parser.add_argument(
        "--marks", action="store_true", help=f"bytes until {MARK} of central GiVA's accuracy is reached"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--plot", type=Path, help="a PNG of accuracy against bytes")
    options = parser.parse_args()

    names = list(dict.fromkeys(itertools.chain.from_iterable(GROUPS.get(row, (row,)) for row in options.rows)))
    runs, settings = [name for name in names if name != "svm"], parse_assignments(options.settings)
    if options.tune:
        validate = functools.partial(outcome, rows="validation.jsonl")
        outcomes = run_all(validate, tuning(runs, options, settings), options.jobs)
        for item in sorted(outcomes, key=lambda item: (names.index(item.row), -item.accuracy)):
            rates = {key: value for key, value in item.settings.items() if key in ROWS[item.row].grid}
            print(json.dumps({"row": item.row, "accuracy": item.accuracy, "loss": item.loss, **rates}))
        return
    seeds = range(options.seeds)
    jobs = [
        job(name, options.task, options.examples, seed, {**tuned(options.task, name), **settings})
        for seed in seeds
        for name in runs
    ]
    outcomes = run_all(outcome, jobs, options.jobs)
    marks = marks_of(jobs, outcomes, options.jobs) if options.marks else {}
    if "svm" in names:
        dataset = job("giva", options.task, options.examples, 0, {}).dataset
        outcomes += [svm_outcome(dataset, seed) for seed in seeds]
    outcomes.sort(key=lambda item: names.index(item.row))
    if options.plot:
        plot(outcomes, options.plot)
    if options.json:
        print(json.dumps([{**asdict(item), "bytes_to_mark": marks.get((item.row, item.seed))} for item in outcomes]))
    else:
        print(table(outcomes, marks))


if __name__ == "__main__":
    main()
