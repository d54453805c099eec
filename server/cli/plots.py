"""Figures of runs: loss, metric and bytes by round. The only file of the commands that needs matplotlib.

A run alone shows its sites as thin lines and the total as a thick one; several runs get a colour each. Colours are
those of Okabe & Ito, "Color Universal Design", 2008, which people with any form of colour blindness can tell apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from giva_core.errors import DependencyError, StoreError

from .result import bytes_text
from .run import value_of

if TYPE_CHECKING:
    from giva_core.types import RoundRecord, SiteRecord
    from server.run_store import RunSummary

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_INK, _SOFT, _QUIET, _GRID = "#222222", "#5F6368", "#9AA0A6", "#E6E8EB"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class _Line:
    """One quantity: where it is found in a round and in a site, and how it is drawn."""

    label: str
    total: Callable[[RoundRecord], float | None]
    site: Callable[[SiteRecord], float | None] | None
    dashes: Any = "-"


def draw(runs: Sequence[tuple[RunSummary, Sequence[RoundRecord]]], metric: str) -> bytes:
    """Draw one run, or compare several.

    Args:
        runs: Runs with their records; one phase is drawn, `train`, or `head` where no run has trained yet.
        metric: The metric by which sites are compared, e.g. `accuracy`.

    Returns:
        A PNG file.

    Raises:
        DependencyError: matplotlib is not installed.
        StoreError: There is no round to draw.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError(
            "figures need matplotlib", got="it is not installed", remedy="pip install 'fedgiva[plot]'"
        ) from error

    phase = "train" if any(record.phase == "train" for _, records in runs for record in records) else "head"
    drawn = [[record for record in records if record.phase == phase] for _, records in runs]
    if not any(drawn):
        raise StoreError(
            "there is no round to draw", got=", ".join(run.run_id for run, _ in runs), remedy="wait for a round to end"
        )
    spoken = metric.replace("_", " ")
    unit, scale = _byte_unit([record for records in drawn for record in records])
    panels = (
        (
            ("Loss", "mean squared error" if metric == "pearson" else "cross-entropy (nats)"),
            _Line("evaluation", lambda record: record.eval_loss, lambda site: site.eval_loss),
            _Line("training", lambda record: record.train_loss, None, ":"),
        ),
        (
            (spoken.capitalize(), f"{spoken} ({'−1' if metric == 'pearson' else '0'} to 1)"),
            _Line("all sites", lambda record: value_of(record.metrics, metric), lambda site: site.metrics.get(metric)),
            _Line("worst site", lambda record: record.metrics.get(f"worst_{metric}"), None, ":"),
        ),
        (
            ("Traffic", f"{unit} per round"),
            _Line("received from sites", lambda record: record.bytes_up / scale, lambda site: site.bytes_up / scale),
            _Line("sent to sites", lambda record: record.bytes_down / scale, None, ":"),
        ),
    )
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 4.6), dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels))
        for axis, ((title, label), *lines) in zip(axes, panels, strict=True):
            _panel(axis, lines, drawn)
            axis.set(title=title, xlabel=f"{phase} round" if phase == "head" else "round", ylabel=label)
        axes[-1].set_ylim(bottom=0)
        _legend(figure, drawn, runs)
        figure.suptitle(_title(runs), x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
        if len(runs) == 1:
            figure.text(0.99, 0.98, _before(runs[0][1]), ha="right", va="top", fontsize=9, color=_SOFT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panel(axis: Any, lines: Sequence[_Line], drawn: Sequence[Sequence[RoundRecord]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    shown = []
    for index, records in enumerate(drawn):
        main = _INK if len(drawn) == 1 else _PALETTE[index % len(_PALETTE)]
        for line in lines:
            for name, colour in _site_colours(records).items() if line.site else ():
                values = [(record.round, _site_value(record, name, line)) for record in records]
                thin = {"color": colour if len(drawn) == 1 else main, "alpha": 0.85 if len(drawn) == 1 else 0.3}
                _curve(axis, values, linewidth=1.1, markersize=2.2, **thin)
            values = [(record.round, line.total(record)) for record in records]
            if _curve(axis, values, linewidth=2.6, markersize=4.5, linestyle=line.dashes, color=main, zorder=3):
                shown.append(line)
    handles = [
        Line2D(
            [], [], color=_INK if len(drawn) == 1 else _QUIET, linewidth=2.2, linestyle=line.dashes, label=line.label
        )
        for line in dict.fromkeys(shown)
    ]
    if handles:
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.22 * (high - low))  # room for the legend, so that it covers no line
        axis.legend(handles=handles, loc="upper right", fontsize=9)
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color=_QUIET)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.tick_params(length=0)


def _curve(axis: Any, values: Sequence[tuple[int, float | None]], **style: Any) -> bool:
    """Draw what is known of a curve; a lost round leaves a gap."""
    known = [math.nan if value is None else value for _, value in values]
    if all(math.isnan(value) for value in known):
        return False
    axis.plot([number for number, _ in values], known, marker="o", **style)
    return True


def _site_value(record: RoundRecord, name: str, line: _Line) -> float | None:
    found = [site for site in record.sites if site.site == name and site.status == "ok"]
    return line.site(found[0]) if found and line.site else None


def _site_colours(records: Sequence[RoundRecord]) -> dict[str, str]:
    """A colour for each site; grey for all where there are more sites than colours."""
    names = sorted({site.site for record in records for site in record.sites})
    if len(names) > len(_PALETTE):
        return dict.fromkeys(names, _QUIET)
    return dict(zip(names, _PALETTE, strict=False))


def _legend(
    figure: Any, drawn: Sequence[Sequence[RoundRecord]], runs: Sequence[tuple[RunSummary, Sequence[RoundRecord]]]
) -> None:
    from matplotlib.lines import Line2D

    if len(runs) > 1:
        entries = [
            (f"{run.name} ({run.run_id})" if run.name else run.run_id, _PALETTE[index % len(_PALETTE)], 2.6)
            for index, (run, _) in enumerate(runs)
        ]
    else:
        colours = _site_colours(drawn[0])
        entries = [(name, colour, 1.4) for name, colour in colours.items()]
        if set(colours.values()) == {_QUIET}:
            entries = [(f"each of {len(colours)} sites", _QUIET, 1.4)]
        entries = [("all sites", _INK, 2.6), *entries]
    handles = [Line2D([], [], color=colour, linewidth=width, label=label) for label, colour, width in entries]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 4 if len(runs) > 1 else 8), fontsize=9
    )


def _title(runs: Sequence[tuple[RunSummary, Sequence[RoundRecord]]]) -> str:
    return f"{len(runs)} runs" if len(runs) > 1 else "  ·  ".join(filter(None, (runs[0][0].name, runs[0][0].run_id)))


def _before(records: Sequence[RoundRecord]) -> str:
    """What calibration cost."""
    before = [record for record in records if record.phase not in ("head", "train")]
    up, down = (sum(getattr(record, name) for record in before) for name in ("bytes_up", "bytes_down"))
    return f"before the first round: {bytes_text(up)} received, {bytes_text(down)} sent" if up + down else ""


def _byte_unit(records: Sequence[RoundRecord]) -> tuple[str, int]:
    largest = max((max(record.bytes_up, record.bytes_down) for record in records), default=0)
    power = min(int(math.log(largest, 1024)), 4) if largest >= 1024 else 0
    return ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024**power
