"""One line for each finished phase or round, for people who watch."""

from __future__ import annotations

from giva_core.config import RunConfig
from giva_core.metrics import main_metric
from giva_core.types import RoundRecord

_ALSO = ("perplexity", "mean_site_perplexity", "exact_match", "choice_accuracy")
_VERBS = {"hello": "sites joined", "calibrate": "calibration pass", "bases": "bases agreed"}


def describe(record: RoundRecord, config: RunConfig) -> str:
    """The record as a line: what, which sites, how it went, what it cost.

    A round's state is evaluated when its training is long told: a record with an evaluation tells of that alone.
    """
    total = {"head": config.rounds.head_rounds, "train": config.rounds.num_rounds}.get(record.phase)
    if record.phase in _VERBS:
        head = f"{_VERBS[record.phase]}{f' {record.round}' if record.phase == 'calibrate' else ''}"
    else:
        head = f"{'head round' if record.phase == 'head' else 'round'} {record.round}/{total}"
    if record.eval_loss is not None:
        count = sum(site.eval_loss is not None for site in record.sites)
        return ", ".join([f"{f'  after {head}':<20} {count} sites", *_evaluation(record, config)])
    parts = [f"{head:<20} {sum(site.status == 'ok' for site in record.sites)}/{len(record.sites)} sites"]
    if record.train_loss is not None:
        parts.append(f"train loss {record.train_loss:.4f}")
    if record.aggregation_error is not None:
        parts.append(f"aggregation error {record.aggregation_error:.1%}")
    if record.bytes_up:
        parts.append(f"up {format_bytes(record.bytes_up)}, down {format_bytes(record.bytes_down)}")
    parts.append(f"{record.seconds:.1f} s")
    lines = [", ".join(parts)]
    lines.extend(f"  {site.site}: {site.status}: {site.reason}" for site in record.sites if site.status != "ok")
    return "\n".join(lines)


def _evaluation(record: RoundRecord, config: RunConfig) -> list[str]:
    main = main_metric(config.task.kind)
    names = (main, f"mean_site_{main}", f"worst_{main}", "macro_f1", *_ALSO)
    found = [f"{name.replace('_', ' ')} {record.metrics[name]:.4f}" for name in names if name in record.metrics]
    return [f"eval loss {record.eval_loss:.4f}", *found]


def format_bytes(count: float) -> str:
    """Bytes for people: `812 B`, `83.2 KiB`, `1.3 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
