"""What leaves a deployed site, byte by byte: messenger and worker under a real federation, every reply written down."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.common.serde import message_to_proto

from client.app import app
from client.backbone import drop_backbones
from client.servicer import Servicer
from client.site_file import SiteFile
from client.trainer import LocalTrainer, drop_trainers
from client.wire import worker_pb2 as pb
from client.wire.codec import WIRE_VERSION
from client.worker_process import work
from client.worker_tasks import Task
from giva_core.config import RunConfig
from giva_core.errors import GivaError
from server.run_store import RunStore
from server.simulate import simulate

LABELS = ("benignoma", "malignoma")
MARKS = ("Hildegard", "Zanzibar-quay", "Überfall", "nephrology")
FOLDER, TRAIN, TEST = "ward-seven", "admissions.jsonl", "discharges.jsonl"

#: Array name and type, and value names, of every reply; the metrics are those of the configured task.
METRICS = {f"metric.{name}": "float" for name in ("accuracy", "macro_f1", "mcc")}
UPDATE = (
    {"state": "float32"},
    {"num-examples": "int", "num-steps": "int", "train-loss": "float", "bases": "str", "seconds": "float"},
)
#: The evaluation of the state that a site gets to train from comes with its update.
EVALUATION = {f"evaluation.{name}": kind for name, kind in {"num-examples": "int", "loss": "float", **METRICS}.items()}
REPLIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "query.hello": (
        {},
        {
            **dict.fromkeys(("site", "schema", "model_digest", "state_digest"), "str"),
            **dict.fromkeys(("frozen_digest", "config_digest", "versions", "device"), "str"),
            **dict.fromkeys(("num_train", "num_eval", "protocol"), "int"),
        },
    ),
    "query.state": ({"state": "float32"}, {}),
    "train.head": UPDATE,
    "train.calibrate": ({"codes": "int16", "exponents": "int16"}, {"num-examples": "int", "loss": "float"}),
    "train.bases": ({}, {"bases": "str"}),
    "train.round": UPDATE,
    "evaluate.round": ({}, {"num-examples": "int", "loss": "float", **METRICS}),
    "query.finish": ({}, {}),
}


class WorkerHere:
    """Stands where a worker's child does, and works in this process: no pipe, the same bytes."""

    def __init__(self, site: SiteFile) -> None:
        self._site = site

    def submit(self, task: Task) -> Future[bytes]:
        future: Future[bytes] = Future()
        future.set_result(work(self._site, task.request, lambda told: None)[1])
        return future

    def count_refused(self) -> None:
        """Nobody asks."""

    def is_active(self) -> bool:
        """The messenger waits."""
        return True


class Recorder:
    """The real ClientApp, with every reply kept as the bytes that travel: from the worker, and from the messenger."""

    def __init__(self) -> None:
        self.replies: list[tuple[str, Message]] = []
        self.wire: list[bytes] = []

    def __call__(self, message: Message, context: Context) -> Message:
        reply = app(message, context)
        self.replies.append((message.metadata.message_type, reply))
        self.wire.append(message_to_proto(reply).SerializeToString())
        return reply

    def reasons(self) -> set[str]:
        return {reply.error.reason for _, reply in self.replies if reply.has_error()}


class Clinic:
    """Three deployed sites, and a federation over them."""

    def __init__(self, root: Path, config: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.store, self.recorder = config, store, Recorder()
        self.folders = [root / f"{FOLDER}-{number}" for number in range(3)]
        rng = random.Random(7)
        for folder in self.folders:
            folder.mkdir(parents=True)
            for name, count in ((TRAIN, 24), (TEST, 12)):
                self.write(folder / name, [self.row(rng) for _ in range(count)])
        model = Path(config.model.path)
        self.sites: list[dict[str, Any]] = [
            {
                "name": f"clinic-{number}",
                "data": {"folder": str(folder), "train-file": TRAIN, "eval-file": TEST},
                "models": {model.name: {"path": str(model)}},
                "policy": {},
                "worker": {"device": "cpu"},
            }
            for number, folder in enumerate(self.folders)
        ]
        monkeypatch.setenv("GIVA_SIMULATION", "0")  # the engine sets what is not set
        monkeypatch.setenv("GIVA_HOME", str(root / "cache"))
        monkeypatch.delenv("GIVA_DEBUG", raising=False)
        monkeypatch.setattr("server.simulate.load_app", lambda: self.recorder)
        monkeypatch.setattr("client.messenger.Link", self.link)
        nodes = {1001 + number: {"worker": f"/run/{number}.sock"} for number in range(3)}
        monkeypatch.setattr("server.simulate.simulated_nodes", lambda config: nodes)
        drop_trainers()
        drop_backbones()

    @contextmanager
    def link(self, socket: str, patience_seconds: float) -> Iterator[Any]:
        """In place of the connection to a worker: the worker's own code, with the bytes of requests and replies."""
        site = SiteFile.from_tables(self.sites[int(Path(socket).stem)], Path("/"))
        here: Any = WorkerHere(site)
        servicer = Servicer(site, here, "none")

        def ask(request: pb.Request, timeout_seconds: float | None) -> pb.Reply:
            request.protocol = WIRE_VERSION
            self.recorder.wire.append(servicer.ask(request.SerializeToString(), here))
            return pb.Reply.FromString(self.recorder.wire[-1])

        yield SimpleNamespace(ask=ask)

    @staticmethod
    def row(rng: random.Random) -> dict[str, str]:
        label = rng.choice(LABELS)
        letters = rng.choices("abcdefghij" if label == LABELS[0] else "pqrstuvwxyz", k=rng.randint(2, 7))
        return {"text": " ".join([*letters, rng.choice(MARKS)]), "label": label}

    @staticmethod
    def write(path: Path, rows: list[dict[str, str]]) -> None:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    def run(self, **settings: object) -> str:
        return simulate(self.config.replace(**settings), self.store)

    def fail(self, **settings: object) -> set[str]:
        """The reasons that the sites give where none can take part."""
        with pytest.raises(GivaError):
            self.run(**settings)
        assert not any(kind.startswith("train") and not r.has_error() for kind, r in self.recorder.replies)
        return self.recorder.reasons()

    def secrets(self) -> set[str]:
        """Marked words of the rows, the labels, file names, and every part of every path."""
        parts = {part for folder in (*self.folders, Path(self.config.model.path)) for part in folder.parts[1:]}
        words = {word for mark in MARKS for word in re.findall(r"\w{4,}", mark)}
        return {*words, *MARKS, *LABELS, TRAIN, TEST, *(part for part in parts if len(part) > 3)}


@pytest.fixture
def clinic(tmp_path: Path, toy_config: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> Clinic:
    config = toy_config.replace(
        task__labels=json.dumps(LABELS), data__folder="", giva__rank=2, giva__oversampling=2, rounds__num_rounds=2
    )
    return Clinic(tmp_path / "hospital", config, store, monkeypatch)


@pytest.fixture
def said(
    clinic: Clinic, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Callable[[], list[bytes]]:
    """Everything that left the process in some way: the replies, the log and the terminal."""
    caplog.set_level(logging.DEBUG)

    def collect() -> list[bytes]:
        return [*clinic.recorder.wire, *(text.encode() for text in (caplog.text, *capfd.readouterr()))]

    return collect


def leaked(secrets: set[str], said: list[bytes]) -> set[str]:
    """Secrets that occur, in whatever case and whichever way JSON or Python would write them."""
    texts = [content.lower() for content in said]
    forms = {s: {s.lower().encode(), json.dumps(s.lower())[1:-1].encode()} for s in secrets}
    return {secret for secret, ways in forms.items() if any(way in text for way in ways for text in texts)}


def test_replies_hold_these_arrays_and_values_and_nothing_of_a_row(
    clinic: Clinic, said: Callable[[], list[bytes]]
) -> None:
    clinic.run()
    kinds = {kind for kind, _ in clinic.recorder.replies}
    assert kinds == set(REPLIES)
    for kind, reply in clinic.recorder.replies:
        arrays, values = REPLIES[kind]
        content = reply.content
        assert {n: a.dtype for record in content.array_records.values() for n, a in record.items()} == arrays, kind
        found = {n: v for record in content.config_records.values() for n, v in record.items()}
        kinds_found = {name: type(value).__name__ for name, value in found.items()}
        is_update = (arrays, values) == UPDATE
        assert kinds_found == values or (is_update and kinds_found == {**values, **EVALUATION}), kind
        assert not content.metric_records
    assert leaked(clinic.secrets(), said()) == set()


def test_rounded_updates_hold_a_byte_a_number_their_scales_and_a_digest(clinic: Clinic) -> None:
    clinic.config = clinic.config.replace(wire__precision="int8")
    clinic.run()
    updates = [reply.content for kind, reply in clinic.recorder.replies if kind in ("train.head", "train.round")]
    assert updates
    for content in updates:
        arrays = {n: a.dtype for record in content.array_records.values() for n, a in record.items()}
        values = {n: type(v).__name__ for record in content.config_records.values() for n, v in record.items()}
        assert arrays == {"state": "int8", "scales": "float32"}
        assert {n: kind for n, kind in values.items() if n not in EVALUATION} == {**UPDATE[1], "digest": "str"}


def test_counts_leave_only_where_the_site_allows_them(clinic: Clinic) -> None:
    assert clinic.config.task.share_counts
    clinic.sites[1]["policy"]["allow-share-counts"] = True
    run_id = clinic.run()
    sent: list[set[str]] = []
    for kind, reply in clinic.recorder.replies:
        arrays = {name for record in reply.content.array_records.values() for name in record} - REPLIES[kind][0].keys()
        if kind == "evaluate.round" or "evaluation.loss" in reply.content.config_records["values"]:
            sent.append({name.removeprefix("evaluation.") for name in arrays})
        else:
            assert not arrays, kind
    assert len(sent) == 3 * 3 and sum(bool(names) for names in sent) == 3
    assert all(name.startswith("count.") for names in sent for name in names)
    metrics = clinic.store.rounds(run_id, "train")[-1].metrics
    assert "mean_site_macro_f1" in metrics and "macro_f1" not in metrics


# -- refusals and failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "policy", "reason"),
    [
        ({"method": "lora"}, {}, "policy: the site's methods does not allow the method lora"),
        ({}, {"tasks": ["regression"]}, "policy: the site's tasks does not allow the task classification"),
        (
            {"giva__modules_to_save": '["word_embeddings"]'},
            {},
            "policy: the site's allow-modules-to-save does not allow giva.modules-to-save",
        ),
        ({"giva__rank": 65}, {}, "policy: the site's max-rank does not allow rank 65"),
        ({"train__local_epochs": 6.0}, {}, "policy: the site's max-local-epochs does not allow 6 local epochs"),
        ({}, {"max-rounds": 2}, "policy: the site's max-rounds does not allow 3 rounds"),
        (
            {"giva__rank": 4},
            {},
            "policy: the site's max-sketch-share does not allow sketches as wide as giva.rank, giva.oversampling "
            "and giva.power-passes make them, of so few calibration tokens",
        ),
        ({"giva__calibration_batch_size": 4}, {}, "data: fewer examples than the site's min-calibration-examples"),
        (
            {"train__max_local_steps": 1, "train__batch_size": 2},
            {},
            "data: fewer examples than the site's min-round-examples",
        ),
        ({}, {"min-train-examples": 25}, "data: fewer examples than the site's min-train-examples"),
        ({"model__path": "/etc/passwd"}, {}, "policy: the site's models do not include the run's"),
    ],
)
def test_what_a_site_refuses(
    clinic: Clinic,
    said: Callable[[], list[bytes]],
    settings: dict[str, object],
    policy: dict[str, object],
    reason: str,
) -> None:
    for site in clinic.sites:
        site["policy"].update(policy)
    assert clinic.fail(**settings) == {reason}
    assert leaked(clinic.secrets(), said()) == set()


def test_a_node_without_a_worker_is_told_so(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {1001 + number: {"partition-id": number} for number in range(3)}
    monkeypatch.setattr("server.simulate.simulated_nodes", lambda config: nodes)
    assert clinic.fail() == {"config: the node's configuration has no worker"}


def test_a_site_with_few_evaluation_rows_reports_none(clinic: Clinic) -> None:
    clinic.sites[0]["policy"]["min-eval-examples"] = 13
    run_id = clinic.run(rounds__num_rounds=1)
    [hello] = [h for h in clinic.store.rounds(run_id, "hello")[0].sites if h.site == "clinic-0"]
    asked = [reply for kind, reply in clinic.recorder.replies if kind == "evaluate.round"]
    assert hello.eval_examples == 0 and len(asked) == 2 * 2


def bad_rows(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.write(clinic.folders[0] / TRAIN, [{"text": "Hildegard", "label": "Hildegard"}, {"text": "", "label": "x"}])


def missing_file(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    (clinic.folders[0] / TRAIN).unlink()


def unreadable_file(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    (clinic.folders[0] / TRAIN).unlink()
    (clinic.folders[0] / TRAIN).mkdir()


def missing_column(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.write(clinic.folders[0] / TRAIN, [{"Hildegard": "a", "label": LABELS[0]}])


def no_model(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.sites[0]["models"] = {Path(clinic.config.model.path).name: {"path": str(clinic.folders[0])}}


def foreign_exception(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalTrainer._rows

    def rows(self: LocalTrainer, path: Path) -> Any:
        if self.site.name == "clinic-0":
            raise RuntimeError(f"cannot encode {path.read_text(encoding='utf-8')} of {path}")
        return real(self, path)

    monkeypatch.setattr(LocalTrainer, "_rows", rows)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (bad_rows, "data: unusable rows (label unknown, text empty)"),
        (missing_file, "data: the data file is missing"),
        (unreadable_file, "data: the data file cannot be read"),
        (missing_column, "data: the data file lacks a column"),
        (no_model, "config: the model cannot be loaded"),
        (foreign_exception, "internal: RuntimeError"),
    ],
)
def test_a_failure_tells_nothing_of_rows_labels_and_paths(
    clinic: Clinic,
    said: Callable[[], list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Clinic, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    spoil(clinic, monkeypatch)
    clinic.run(rounds__min_sites=2, rounds__num_rounds=1)
    assert clinic.recorder.reasons() == {reason}
    assert leaked(clinic.secrets(), said()) == set()


def test_a_failure_in_the_middle_of_a_round_tells_nothing_either(
    clinic: Clinic, said: Callable[[], list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError(f"{MARKS[0]} is {LABELS[1]} in {clinic.folders[0] / TRAIN}")

    monkeypatch.setattr("client.trainer.train_round", fail)
    assert clinic.fail() == {"internal: ValueError"}
    assert leaked(clinic.secrets(), said()) == set()


def test_the_search_for_secrets_finds_them() -> None:
    assert leaked({"Überfall", "ward-seven"}, ["über \\u00fcberfall".encode(), b"/WARD-SEVEN/x"]) == {
        "Überfall",
        "ward-seven",
    }
