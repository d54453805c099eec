"""The medical task: federated GiVA beside central GiVA, the frozen encoder, FedAvg-LoRA and TF-IDF + SVM.

    python benchmarks/medical.py                       the demo: federated GiVA on a small subset
    python benchmarks/medical.py --baselines           and its baselines
    python benchmarks/medical.py --full --baselines    with all training questions
    python benchmarks/medical.py --examples 3000 --baselines --seeds 3
    python benchmarks/medical.py --examples 3000 --baselines --tune      the learning rates, on the validation rows

Every run is kept in the run store and found again by its settings: an interrupted benchmark goes on where it was. Runs
see the training and the validation rows; the test rows are looked at once, with the last state of a finished run.
A seed decides the split of the data, the sites, the sketches, the head and the order of training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# one run to a core: two threads in one run gain less than a second run
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GIVA_SIMULATION", "1")

from giva_core.config import RunConfig, parse_assignments
from giva_core.factored import is_residual
from giva_core.metrics import total_metrics
from giva_core.paths import giva_home
from giva_core.types import RoundRecord
from server.cli.result import bytes_text
from server.progress import describe
from server.run_store import RunStore, default_root
from server.simulate import simulate

#: Method, seed, training examples, settings, file of the evaluation rows.
Task = tuple[str, int, int, dict[str, Any], str]

RECIPE = Path(__file__).parent.parent / "recipes" / "medical.toml"
DEMO_EXAMPLES = 1500
#: Beyond the demo: more rounds, each over a part of the data, and one evaluation at the end.
LONGER_SETTINGS = {
    "rounds.head-rounds": 10,
    "rounds.num-rounds": 8,
    "train.local-epochs": 0.375,
    "rounds.evaluate-every": 100,
}


#: Settings that say how long to wait and for whom; they do not change what a run comes to.
_WAITING = {
    "rounds.min-sites",
    "rounds.quorum",
    "rounds.deadline-seconds",
    "rounds.join-seconds",
    "rounds.hello-seconds",
    "rounds.max-site-examples",
    "rounds.retries",
}


@dataclass(frozen=True)
class Method:
    """One row of the table: its settings beside the recipe's, and the grid that `--tune` searches."""

    label: str
    settings: dict[str, Any]
    grid: dict[str, tuple[float, ...]]
    central: bool = False


METHODS = {
    "giva": Method("federated GiVA r=8", {}, grid={"train.learning-rate": (0.02, 0.05, 0.1)}),
    "giva-central": Method("central GiVA r=8", {}, central=True, grid={"train.learning-rate": (0.02, 0.05, 0.1)}),
    "lora": Method("FedAvg-LoRA r=8", {"method": "lora"}, grid={"train.learning-rate": (5e-4, 1e-3, 2e-3, 4e-3)}),
    "head": Method(
        "frozen encoder, federated head",
        {"method": "head", "rounds.head-rounds": 0, "rounds.num-rounds": 20, "train.local-epochs": 1.0},
        grid={"train.head-learning-rate": (1e-3, 2e-3, 5e-3, 1e-2), "train.head-epsilon": (1e-8, 1e-2)},
    ),
}
#: The table of `--baselines`; the other methods run where `--methods` names them.
BASELINES = tuple(METHODS)


def _rival(label: str, rates: tuple[float, ...], **settings: Any) -> Method:
    return Method(label, settings, grid={"train.learning-rate": rates})


_LORA_RATES = METHODS["lora"].grid["train.learning-rate"]
METHODS |= {
    "ffa-lora": _rival("FFA-LoRA r=8", _LORA_RATES, method="ffa-lora"),
    "rolora": _rival("RoLoRA r=8", _LORA_RATES, method="rolora"),
    "fedex-lora": _rival("FedEx-LoRA r=8", _LORA_RATES, method="fedex-lora"),
    "vera": _rival("VeRA r=256", (0.005, 0.02, 0.05), method="vera"),
    "osora": _rival("OSoRA r=8", (0.001, 0.005, 0.02), method="osora"),
    "randlora": _rival("RandLoRA r=32", (1e-4, 5e-4, 2e-3), method="randlora"),
    "lora-xs": _rival("LoRA-XS r=8", (0.001, 0.005, 0.02), method="lora-xs"),
    "fed-sb": _rival(
        "Fed-SB r=8, federated bases", (0.001, 0.005, 0.02), method="lora-xs", **{"lora_xs.bases": "gradient"}
    ),
    "full": _rival("all weights", (1e-5, 3e-5, 1e-4), method="full"),
}
#: The best of each grid by accuracy on the validation rows of seed 0, as `--examples 3000 --tune` prints them.
TUNED: dict[str, dict[str, Any]] = {
    "giva": {"train.learning-rate": 0.05},
    "giva-central": {"train.learning-rate": 0.05},
    "lora": {"train.learning-rate": 2e-3},
    "head": {"train.head-learning-rate": 5e-3, "train.head-epsilon": 1e-2},
}


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    method: str
    seed: int
    accuracy: float
    macro_f1: float
    worst_accuracy: float | None
    loss: float
    round_bytes_up: float
    total_bytes: int
    step_seconds: float
    aggregation_error: float | None
    settings: dict[str, Any]


def data_folder(examples: int, seed: int) -> Path:
    """Where `giva data prepare` puts this split; it is made where it is missing."""
    from client.prepare import prepare

    made = prepare(
        "medical",
        home=giva_home(),
        train_examples=examples,
        seed=seed,
        progress=lambda text: print(text, file=sys.stderr),
    )
    return Path(made.folder)


def configure(method: str, seed: int, examples: int, settings: dict[str, Any]) -> RunConfig:
    """The recipe with the method's settings, the tuned ones and those given, on this seed's split."""
    spec = METHODS[method]
    folder = data_folder(examples, seed)
    longer = {} if examples == DEMO_EXAMPLES else LONGER_SETTINGS
    # a method whose rate was not searched yet runs at the middle of its grid
    tuned = TUNED.get(method) or {key: values[len(values) // 2] for key, values in spec.grid.items()}
    config = RunConfig.from_toml(RECIPE, {**longer, **spec.settings, **tuned, **settings})
    flat = {
        "giva.seed": seed,
        "data.eval-file": "validation.jsonl",
        "data.folder": str(folder / "sites"),
        "name": f"{method}-{seed}",
    }
    if spec.central:
        flat.update({"rounds.min-sites": 1, "rounds.quorum": 1, "data.folder": str(_pooled_site(folder))})
    return RunConfig.from_flat({**config.to_flat(), **flat})


def _pooled_site(folder: Path) -> Path:
    """A folder whose only site holds everybody's rows: what no federation may have, as the mark to reach."""
    link = folder / "central" / "pooled"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(folder / "pooled")
    return link.parent


def outcome(task: Task) -> Outcome:
    """Run one configuration, or find it in the store; then evaluate its last state on the rows that count."""
    method, seed, examples, settings, eval_file = task
    config = configure(method, seed, examples, settings)
    store = RunStore(default_root())
    run_id = _finished(store, config)
    if run_id is None:

        def watch(record: RoundRecord) -> None:
            print(f"[{config.name}] {describe(record, config)}", file=sys.stderr, flush=True)

        run_id = simulate(config, store, watch)
    records = store.rounds(run_id)
    last = [record for record in records if record.phase == "train"][-1]
    trained = [site for record in records if record.phase == "train" for site in record.sites if site.num_steps]
    metrics, loss = evaluate(store, run_id, config, eval_file)
    central = METHODS[method].central
    return Outcome(
        method=method,
        seed=seed,
        accuracy=metrics["accuracy"],
        macro_f1=metrics["macro_f1"],
        worst_accuracy=None if central else metrics["worst_accuracy"],
        loss=loss,
        round_bytes_up=min(site.bytes_up for site in last.sites),
        total_bytes=sum(record.bytes_up + record.bytes_down for record in records),
        step_seconds=statistics.median(site.train_seconds / site.num_steps for site in trained),
        aggregation_error=last.aggregation_error,
        settings=settings,
    )


def evaluate(store: RunStore, run_id: str, config: RunConfig, eval_file: str) -> tuple[dict[str, float], float]:
    """Totals of the run's last state over all sites' rows in `eval_file`, and the mean loss."""
    from client.site import site_folders, site_settings
    from client.trainer import get_trainer

    local = config.replace(data__eval_file=eval_file)
    stored = store.last_state(run_id)
    if stored is None:
        raise SystemExit(f"run {run_id} has no state")
    digest = str(store.run(run_id).facts.get("bases_digest", ""))
    residual = {name: array for name, array in stored.extra.items() if is_residual(name)}
    found = []
    for index in range(len(site_folders(local.data))):
        trainer = get_trainer(site_settings(local, {"partition-id": index}), local)
        found.append(trainer.evaluate({**stored.arrays, **residual}, digest))
    total = sum(item.num_examples for item in found)
    return total_metrics(config.task.kind, found), sum(item.loss * item.num_examples for item in found) / total


def _finished(store: RunStore, config: RunConfig) -> str | None:
    defaults, wanted = RunConfig().to_flat(), config.to_flat()
    for run in store.runs():
        settings = {**defaults, **run.settings}  # a run of an earlier version lacks the settings that came later
        if run.status == "completed" and all(settings[key] == wanted[key] for key in wanted if key not in _WAITING):
            return run.run_id
    return None


def svm_outcome(seed: int, examples: int) -> Outcome:
    """TF-IDF over words and word pairs, and a linear SVM, on the pooled rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    folder = data_folder(examples, seed) / "pooled"
    (texts, labels), (test_texts, test_labels) = (_rows(folder / f"{name}.jsonl") for name in ("train", "test"))
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC(C=0.5)).fit(texts, labels)
    found = model.predict(test_texts)
    f1 = f1_score(test_labels, found, average="macro")
    nan = float("nan")
    return Outcome("svm", seed, accuracy_score(test_labels, found), f1, None, nan, 0, 0, nan, None, {})


def _rows(path: Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def run_all(tasks: Sequence[Task], jobs: int) -> list[Outcome]:
    """All tasks, `jobs` at a time, in processes of their own."""
    for examples, seed in {(task[2], task[1]) for task in tasks}:
        data_folder(examples, seed)  # before the processes start, so that no two make the same folder
    if jobs == 1:
        return [outcome(task) for task in tasks]
    with ProcessPoolExecutor(jobs, max_tasks_per_child=1) as pool:
        return list(pool.map(outcome, tasks))


def table(outcomes: Iterable[Outcome]) -> str:
    """Mean ± standard deviation over the seeds, method by method."""
    by_method: dict[str, list[Outcome]] = {}
    for item in outcomes:
        by_method.setdefault(item.method, []).append(item)
    columns = ("accuracy", "macro-F1", "worst site")
    lines = [f"{'method':<32} {''.join(f'{c:>16}' for c in columns)} {'up/site/round':>14} {'total':>10} {'s/step':>7}"]
    for method, items in by_method.items():
        label = METHODS[method].label if method in METHODS else "TF-IDF + linear SVM, pooled"
        central = method not in METHODS or METHODS[method].central
        lines.append(
            f"{label:<32} {_spread([i.accuracy for i in items]):>15} {_spread([i.macro_f1 for i in items]):>15} "
            f"{'-' if central else _spread([i.worst_accuracy or 0.0 for i in items]):>15} "
            f"{'-' if central else bytes_text(round(items[0].round_bytes_up)):>14} "
            f"{'-' if central else bytes_text(items[0].total_bytes):>10} "
            f"{'-' if method not in METHODS else f'{statistics.median([i.step_seconds for i in items]):.3f}':>7}"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ± {statistics.stdev(values):.4f}"


def tuning_tasks(methods: Iterable[str], examples: int, settings: dict[str, Any]) -> list[Task]:
    """Every point of every method's grid, on the validation rows of seed 0."""
    tasks = []
    for method in methods:
        grid = METHODS[method].grid
        for point in itertools.product(*grid.values()):
            tasks.append((method, 0, examples, {**settings, **dict(zip(grid, point, strict=True))}, "validation.jsonl"))
    return tasks


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=DEMO_EXAMPLES, help="training questions; 0: all of them")
    parser.add_argument("--full", dest="examples", action="store_const", const=0, help="all training questions")
    parser.add_argument(
        "--baselines", action="store_true", help="central GiVA, head only, FedAvg-LoRA, TF-IDF + SVM as well"
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "svm"], help="these methods only")
    parser.add_argument("--tune", action="store_true", help="search the rates on the validation rows")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    options = parser.parse_args()

    examples = options.examples
    methods = options.methods or ([*BASELINES, "svm"] if options.baselines else ["giva"])
    runs = [method for method in methods if method != "svm"]
    settings = parse_assignments(options.settings)
    if options.tune:
        outcomes = run_all(tuning_tasks(runs, examples, settings), options.jobs)
        for item in sorted(outcomes, key=lambda item: (item.method, -item.accuracy)):
            print(json.dumps(asdict(item)))
        return
    seeds = range(options.seeds)
    outcomes = run_all([(m, seed, examples, settings, "test.jsonl") for seed in seeds for m in runs], options.jobs)
    if "svm" in methods:
        outcomes += [svm_outcome(seed, examples) for seed in seeds]
    outcomes.sort(key=lambda item: methods.index(item.method))
    print(json.dumps([asdict(item) for item in outcomes]) if options.json else table(outcomes))


if __name__ == "__main__":
    main()
