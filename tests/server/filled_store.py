"""What run stores are filled with in tests: records, states, two realistic runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from giva_core.config import RunConfig
from giva_core.types import RoundRecord, SiteRecord
from server.run_store import RunStore

SITES = ("clinic-a", "clinic-b", "clinic-c", "clinic-d")
VERSIONS = {"fedgiva": "0.1.0", "numpy": "2.2.0"}


def train_record(number: int, *, offset: float = 0.0, missing: str = "") -> RoundRecord:
    """A training round in which losses fall and one site may be missing."""
    sites = []
    for index, name in enumerate(SITES):
        if name == missing:
            sites.append(SiteRecord(name, "missing", "no answer within 60 s", bytes_down=4096))
            continue
        accuracy = 0.5 + 0.4 * (1 - math.exp(-0.5 * number)) - 0.03 * index - offset
        sites.append(
            SiteRecord(
                site=name,
                status="ok",
                num_examples=120 + 40 * index,
                num_steps=8 + index,
                train_loss=0.4 + math.exp(-0.4 * number) + 0.05 * index + offset,
                train_seconds=1.25 + index,
                eval_examples=30 + 10 * index,
                eval_loss=0.5 + math.exp(-0.4 * number) + 0.06 * index + offset,
                metrics={"accuracy": accuracy, "macro_f1": accuracy - 0.04},
                bytes_up=334_080 + 100 * index,
                bytes_down=351_000,
            )
        )
    ok = [site for site in sites if site.status == "ok"]
    accuracies = [site.metrics["accuracy"] for site in ok]
    return RoundRecord(
        phase="train",
        round=number,
        sites=tuple(sites),
        total_examples=sum(site.num_examples for site in ok),
        train_loss=0.45 + math.exp(-0.4 * number) + offset,
        eval_loss=0.58 + math.exp(-0.4 * number) + offset,
        metrics={
            "accuracy": sum(accuracies) / len(ok),
            "mean_site_macro_f1": sum(accuracies) / len(ok) - 0.04,
            "worst_accuracy": min(accuracies),
        },
        aggregation_error=0.29 / number,
        bytes_up=sum(site.bytes_up for site in sites),
        bytes_down=sum(site.bytes_down for site in sites),
        seconds=7.5,
    )


def other_record(phase: str, up: int, down: int) -> RoundRecord:
    """A phase without training."""
    sites = tuple(SiteRecord(name, "ok", bytes_up=up // 4, bytes_down=down // 4) for name in SITES)
    return RoundRecord(phase, 1, sites, bytes_up=up, bytes_down=down, seconds=0.5)


def fill(root: Path) -> tuple[RunStore, str, str]:
    """A store with a finished run of 5 rounds and a newer one that failed after 2; returns their ids, older first."""
    store = RunStore(root)
    config = RunConfig.from_flat({"name": "medical", "giva.rank": 4, "task.labels": ["no", "yes"]})
    first = store.create_run(config, "simulation", VERSIONS)
    second = store.create_run(config.replace(name="baseline", giva__rank=2), "flower", VERSIONS)
    store.record(first, other_record("hello", 2_048, 512))
    store.record(first, other_record("calibrate", 1_572_864, 2_048))
    store.set_facts(first, {"bases_digest": "ab12" * 16})
    for number in range(1, 6):
        record = train_record(number, missing="clinic-c" if number == 3 else "")
        store.record(first, record, {"layer.lambda_o": np.full(6, number, np.float32)})
    store.set_status(first, "completed")
    for number in range(1, 3):
        store.record(second, train_record(number, offset=0.08))
    store.set_status(second, "failed", "quorum: 1 of 2 updates")
    return store, first, second


def state(value: float) -> dict[str, np.ndarray]:
    """A state whose numbers are all `value`."""
    return {"layer.lambda_o": np.full((4, 3), value, np.float32)}


def stored_value(store: RunStore, run_id: str) -> float:
    """The `value` of the run's last state."""
    found = store.last_state(run_id)
    assert found is not None
    return float(found.arrays["layer.lambda_o"][0, 0])
