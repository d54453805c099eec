"""Whole runs for the benchmarks of accuracy: found again by their settings, resumed, forked, judged; all results kept.

A run that was interrupted is resumed and a finished one is found, whoever asks. Runs of a seed that differ in nothing
that the head rounds see share these. What a run came to is kept beside the run store, in `$GIVA_HOME/benchmarks`. A run
is found whichever version made it: after a change of what is computed, begin with an empty `$GIVA_HOME/store`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# one run to a core: two threads in one run gain less than a second run
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GIVA_SIMULATION", "1")

from _folders import first_site, pooled_site, sites_of

from client.prepare import prepare
from client.prepare_answers import prepare_answers
from client.site import site_folders, site_settings
from client.trainer import LocalTrainer, get_trainer
from giva_core.config import RunConfig
from giva_core.factored import is_residual
from giva_core.metrics import total_metrics
from giva_core.paths import giva_home
from giva_core.types import Arrays, RoundRecord
from server.app import server_versions
from server.array_files import write_atomically
from server.progress import describe
from server.run_store import RunStore, default_root
from server.simulate import ENGINE, resume
from server.sketches import sketches_from_arrays

RECIPES = Path(__file__).parent.parent / "recipes"
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
#: Settings that head rounds do not see; of GiVA also all that its bases are made with.
_AFTER_HEAD = {"name", "train.learning-rate", "rounds.num-rounds", "rounds.mode"}
_OF_BASES = {
    "giva.rank",
    "giva.bases",
    "giva.init",
    "giva.oversampling",
    "giva.power-passes",
    "giva.calibration-batches",
    "giva.calibration-batch-size",
    "giva.sketch-bits",
}


@dataclass(frozen=True)
class Dataset:
    """A task with its data.

    Attributes:
        name: What `giva data prepare` calls it.
        examples: Training examples: in all for `medical`, of each site for `sentiment` and `answers`.
        settings: Beside the recipe of the same name.
    """

    name: str
    examples: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, seed: int) -> Path:
        """The split of this seed; it is made where it is missing."""

        def tell(text: str) -> None:
            if "already" not in text:
                print(text, file=sys.stderr)

        make = prepare_answers if self.name == "answers" else functools.partial(prepare, self.name)
        return Path(make(home=giva_home(), train_examples=self.examples, seed=seed, progress=tell).folder)

    @property
    def recipe(self) -> Path:
        """The recipe that runs start from."""
        return RECIPES / f"{self.name}.toml"


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        row: Name of the row that it belongs to; part of the run's name.
        dataset: The task.
        seed: Decides the split of the data, the sites, the sketches, the head and the order of training.
        settings: Beside the dataset's.
        central: Train one site that holds all sites' rows.
        bases_of: `one-site`, `pooled`: whose calibration gradient the bases come from; empty: the run's own sites'.
    """

    row: str
    dataset: Dataset
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    central: bool = False
    bases_of: str = ""

    def config(self) -> RunConfig:
        """The recipe with the dataset's settings and the job's own, on this seed's split."""
        folder = self.dataset.folder(self.seed)
        flat = {
            **self.dataset.settings,
            "train.num-threads": 1,
            **self.settings,
            "giva.seed": self.seed,
            "data.eval-file": "validation.jsonl",
            "data.folder": str(folder / "sites"),
            "name": f"{self.row}-{self.seed}",
        }
        if self.central:
            flat.update({"rounds.min-sites": 1, "rounds.quorum": 1, "data.folder": str(pooled_site(folder))})
        return RunConfig.from_toml(self.dataset.recipe, flat)


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        row: The row's name.
        seed: The run's seed.
        rows: The file of the rows that it was judged by.
        accuracy: Over all sites' rows.
        macro_f1: Over all sites' rows.
        worst_accuracy: The site with the lowest; None at the centre.
        loss: Mean loss over all sites' rows; None for a method without.
        round_bytes_up: What a site sent in the last round.
        total_bytes: All bytes of the run, both ways; None where its bases came from elsewhere.
        step_seconds: Median over the sites and rounds.
        first_error: Aggregation error of the first round; None where there is none.
        last_error: That of the last.
        settings: Of the job.
        run_id: In the run store.
    """

    row: str
    seed: int
    rows: str
    accuracy: float
    macro_f1: float
    worst_accuracy: float | None
    loss: float | None
    round_bytes_up: float
    total_bytes: int | None
    step_seconds: float
    first_error: float | None
    last_error: float | None
    settings: Mapping[str, Any]
    run_id: str


# -- runs -------------------------------------------------------------------------------------------------------------


def outcome(job: Job, rows: str = "test.jsonl") -> Outcome:
    """Run the job, or find it; then judge its last state by `rows`, or find that too."""
    config, store = job.config(), RunStore(default_root())
    run_id = finished(job, config, store)
    kept = _kept(run_id, rows)
    if kept.exists():
        return Outcome(**json.loads(kept.read_text(encoding="utf-8")))
    records = store.rounds(run_id)
    training = [record for record in records if record.phase == "train"]
    trained = [site for record in training for site in record.sites if site.num_steps]
    metrics, loss = judged(job, config.rounds.num_rounds, rows)
    made = Outcome(
        row=job.row,
        seed=job.seed,
        rows=rows,
        accuracy=metrics["accuracy"],
        macro_f1=metrics["macro_f1"],
        worst_accuracy=None if job.central else metrics["worst_accuracy"],
        loss=loss,
        round_bytes_up=min(site.bytes_up for site in training[-1].sites),
        total_bytes=None if job.bases_of else sum(map(_spent, records)),
        step_seconds=statistics.median(site.train_seconds / site.num_steps for site in trained),
        first_error=training[0].aggregation_error,
        last_error=training[-1].aggregation_error,
        settings=dict(job.settings),
        run_id=run_id,
    )
    _keep(kept, asdict(made))
    return made


def finished(job: Job, config: RunConfig, store: RunStore) -> str:
    """The id of the job's run, which is found, resumed or made."""
    found = _runs_like(store, config, _WAITING)
    done = next((run.run_id for run in found if run.status == "completed"), None)
    if done is not None:
        return done

    def watch(record: RoundRecord) -> None:
        if record.phase == "train":
            print(f"[{config.name}] {describe(record, config)}", file=sys.stderr, flush=True)

    run_id = found[0].run_id if found else _begin(config, store)
    if job.bases_of and "bases_digest" not in store.run(run_id).facts:
        _finish_head(config, store, run_id)
        _bring_bases(job, config, store, run_id)
    return resume(run_id, store, watch)


def _begin(config: RunConfig, store: RunStore) -> str:
    """A new run, with the head rounds of another one where there are such."""
    run_id = store.create_run(config, ENGINE, server_versions())
    _copy_head(config, store, run_id)
    return run_id


def _copy_head(config: RunConfig, store: RunStore, run_id: str) -> None:
    """The head rounds of a finished run that differs in nothing that they see: the same seed gives the same bytes."""
    if not config.rounds.head_rounds or config.wire.precision != "float32":
        return  # what rounding lost in head rounds is kept at the sites, by run
    free = _WAITING | _AFTER_HEAD | (_OF_BASES if config.method == "giva" else set())
    source = next((run for run in _runs_like(store, config, free) if run.status == "completed"), None)
    if source is not None:
        _copy_records(store, source.run_id, run_id)


def _copy_records(store: RunStore, source: str, target: str) -> None:
    for record in store.rounds(source, "head"):
        state = store.state(source, "head", record.round)
        store.record(target, record, state.arrays, state.extra)


class _HeadDone(Exception):
    """The head rounds are over."""


def _finish_head(config: RunConfig, store: RunStore, run_id: str) -> None:
    """Carry a run to the end of its head rounds and no further."""

    def stop(record: RoundRecord) -> None:
        if record.phase == "head" and record.round == config.rounds.head_rounds:
            raise _HeadDone

    if len(store.rounds(run_id, "head")) < config.rounds.head_rounds:
        with contextlib.suppress(_HeadDone):
            resume(run_id, store, stop)


def _bring_bases(job: Job, config: RunConfig, store: RunStore, run_id: str) -> None:
    """Bases of one site's gradient, or the pooled data's, of as many examples: a short run of one site makes them."""
    folder = job.dataset.folder(job.seed)
    examples = config.giva.calibration_batches * config.giva.calibration_batch_size * len(sites_of(folder))
    flat: dict[str, Any] = {
        **config.to_flat(),
        "name": f"bases-{job.bases_of}-{job.seed}",
        "data.folder": str(pooled_site(folder) if job.bases_of == "pooled" else first_site(folder)),
        "giva.calibration-batches": 1,
        "giva.calibration-batch-size": examples,
        "rounds.min-sites": 1,
        "rounds.quorum": 1,
        "rounds.num-rounds": 1,
        "train.max-local-steps": 1,
    }
    lone = RunConfig.from_flat(flat)
    done = next((run.run_id for run in _runs_like(store, lone, _WAITING) if run.status == "completed"), None)
    if done is None:
        made = store.create_run(lone, ENGINE, server_versions())
        _copy_records(store, run_id, made)  # the gradient is taken at the federation's head
        done = resume(made, store)
    store.save_blob(run_id, "sketches", store.load_blob(done, "sketches"))
    store.set_facts(run_id, {"bases_digest": store.run(done).facts["bases_digest"]})


def _runs_like(store: RunStore, config: RunConfig, free: set[str]) -> list[Any]:
    """Runs whose settings are `config`'s, but for those in `free`; newest first."""
    defaults, wanted = RunConfig().to_flat(), config.to_flat()
    found = []
    for run in store.runs():
        settings = {**defaults, **run.settings}  # a run of an earlier version lacks the settings that came later
        if all(settings[key] == value for key, value in wanted.items() if key not in free):
            found.append(run)
    return found


# -- judging ----------------------------------------------------------------------------------------------------------


def evaluate(
    store: RunStore, run_id: str, config: RunConfig, rows: str, state: tuple[str, int]
) -> tuple[dict[str, float], float]:
    """Totals of the state after this phase and round, over all sites' rows in the file `rows`, and the mean loss."""
    local = config.replace(data__eval_file=rows)
    stored = store.state(run_id, *state)
    has_bases = stored.phase != "head" and "bases_digest" in store.run(run_id).facts
    arrays: Arrays = {**stored.arrays, **{name: array for name, array in stored.extra.items() if is_residual(name)}}
    found = []
    for index in range(len(site_folders(local.data))):
        trainer = get_trainer(site_settings(local, {"partition-id": index}), local)
        found.append(trainer.evaluate(arrays, build_bases(trainer, store, run_id) if has_bases else ""))
    total = sum(item.num_examples for item in found)
    return total_metrics(config.task.kind, found), sum(item.loss * item.num_examples for item in found) / total


def build_bases(trainer: LocalTrainer, store: RunStore, run_id: str) -> str:
    """Give the trainer the run's bases, which a site's cache may have dropped; returns their digest."""
    return trainer.build_bases(*sketches_from_arrays(store.load_blob(run_id, "sketches")))


def bytes_to(job: Job, accuracy: float, rows: str = "validation.jsonl") -> int | None:
    """All bytes of the run until a state of it reaches `accuracy` on `rows`; None where none does."""
    config, store = job.config(), RunStore(default_root())
    run_id = finished(job, config, store)
    spent = 0
    for record in store.rounds(run_id):
        spent += _spent(record)
        if record.phase == "train" and judged(job, record.round, rows)[0]["accuracy"] >= accuracy:
            return spent
    return None


def judged(job: Job, number: int, rows: str = "validation.jsonl") -> tuple[dict[str, float], float]:
    """Metrics and mean loss of the state after training round `number`; after the head rounds for 0."""
    config, store = job.config(), RunStore(default_root())
    run_id = finished(job, config, store)
    state = ("train", number) if number else ("head", config.rounds.head_rounds)
    if rows == config.data.eval_file:  # the run may have looked itself
        for record in store.rounds(run_id, state[0]):
            if record.round == state[1] and record.eval_loss is not None:
                return dict(record.metrics), record.eval_loss
    kept = _kept(run_id, f"{rows}@{state[0]}-{state[1]}")
    if not kept.exists():
        metrics, loss = evaluate(store, run_id, config, rows, state)
        _keep(kept, {"metrics": metrics, "loss": loss})
    found = json.loads(kept.read_text(encoding="utf-8"))
    return found["metrics"], found["loss"]


def _spent(record: RoundRecord) -> int:
    """Bytes of a phase, both ways; a resumed run greets its sites and sends them the bases once more, uncounted."""
    again = record.phase in ("hello", "bases") and record.round > 1
    return 0 if again else record.bytes_up + record.bytes_down


def _kept(run_id: str, what: str) -> Path:
    """Where a result of a run is kept."""
    return giva_home() / "benchmarks" / run_id / f"{what}.json"


def _keep(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content).encode())


# -- many -------------------------------------------------------------------------------------------------------------


def run_all(function: Callable[[Job], Any], jobs: Sequence[Job], processes: int) -> list[Any]:
    """`function` of every job, `processes` at a time, in processes of their own; results in the order of the jobs."""
    places = {(job.dataset.name, job.dataset.examples, job.seed): (job.dataset, job.seed) for job in jobs}
    for dataset, seed in places.values():
        folder = dataset.folder(seed)  # before the processes start, so that no two make the same one
        pooled_site(folder)
        first_site(folder)
    RunStore(default_root())
    if processes == 1:
        return [function(job) for job in jobs]
    with ProcessPoolExecutor(processes, max_tasks_per_child=1) as pool:
        return list(pool.map(function, jobs))
