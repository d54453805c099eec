"""`giva metrics`: long form and figures."""

from __future__ import annotations

import csv
import io
import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from filled_store import SITES, train_record

from giva_core.config import RunConfig
from giva_core.types import SiteRecord
from server.cli.main import cli
from server.cli.metrics import COLUMNS
from server.run_store import RunStore


def test_metrics_show(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    done = giva("metrics", "show", filled[1], "--json")
    data = json.loads(done.stdout)["data"]
    assert set(data) == {"run_id", "metric", "rounds", "sites"}
    assert set(data["rounds"][0]) == {"phase", "round", "train_loss", "eval_loss", "metrics"}
    assert set(data["sites"][0]) == {"site", "eval_examples", "eval_loss", "metrics"}
    assert [site["site"] for site in data["sites"]] == list(SITES)
    shown = giva("metrics", "show", filled[1]).stdout
    assert "mean_site_macro_f1" in shown and "By site, train round 5" in shown


def test_metrics_show_of_an_untrained_run(tmp_path: Path) -> None:
    RunStore(tmp_path).create_run(RunConfig(), "simulation", {})
    done = CliRunner().invoke(cli, ["metrics", "show", "--store", str(tmp_path)])
    assert done.exit_code == 0 and "has trained nothing yet" in done.stdout


def test_export_is_csv_on_stdout(giva: Callable[..., Result], filled: tuple[RunStore, str, str]) -> None:
    store, first, _ = filled
    rows = list(csv.DictReader(io.StringIO(giva("metrics", "export", first).stdout)))
    assert tuple(rows[0]) == COLUMNS
    found = {(row["phase"], row["round"], row["site"], row["metric"]): row["value"] for row in rows}
    assert len(found) == len(rows)
    record = store.rounds(first, "train")[4]
    assert float(found["train", "5", "", "eval_loss"]) == record.eval_loss
    assert float(found["train", "5", "", "worst_accuracy"]) == record.metrics["worst_accuracy"]
    assert float(found["train", "5", "clinic-b", "macro_f1"]) == record.sites[1].metrics["macro_f1"]
    assert ("train", "3", "clinic-c", "train_loss") not in found


def test_export_forms_agree(giva: Callable[..., Result], filled: tuple[RunStore, str, str], tmp_path: Path) -> None:
    rows = json.loads(giva("metrics", "export", filled[1], "--format", "json").stdout)
    output = tmp_path / "deep" / "metrics.json"
    done = giva("metrics", "export", filled[1], "--format", "json", "--output", output, "--json")
    data = json.loads(done.stdout)["data"]
    assert set(data) == {"run_id", "format", "output", "rows"} and data["output"] == str(output)
    assert json.loads(output.read_text()) == rows == data["rows"]
    assert giva("metrics", "export", filled[1], "--output", output).stdout.startswith(f"Wrote {len(rows)} values")
    assert len(output.read_text().splitlines()) == len(rows) + 1


def test_an_output_that_cannot_be_written_is_an_error(giva: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = giva("metrics", "export", "--output", tmp_path / "file" / "out.csv")
    assert done.exit_code == 1 and "cannot be written" in done.stderr and "--output" in done.stderr


def png_size(file: Path) -> tuple[int, int]:
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_plot_of_one_run(giva: Callable[..., Result], filled: tuple[RunStore, str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = giva("metrics", "plot", filled[1], "--output", tmp_path / "figures", "--json")
    data = json.loads(done.stdout)["data"]
    assert set(data) == {"runs", "metric", "output"} and data["runs"] == [filled[1]]
    width, height = png_size(tmp_path / "figures" / f"{filled[1]}.png")
    assert width > 1500 and 2 * height < width * 1.5
    assert "pyplot" not in "".join(name for name in sys.modules if name.startswith("matplotlib."))


def test_plot_compares_runs(giva: Callable[..., Result], filled: tuple[RunStore, str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = giva("metrics", "plot", filled[1], "last", filled[2], "--output", tmp_path / "both.png", "--json")
    assert json.loads(done.stdout)["data"]["runs"] == [filled[1], filled[2]]
    assert png_size(tmp_path / "both.png")[0] > 1500
    assert (
        giva("metrics", "plot", filled[1], "last", "--output", tmp_path).stdout == f"Wrote {tmp_path}/comparison.png.\n"
    )


def test_curves_carry_the_recorded_values(filled: tuple[RunStore, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    from server.cli.plots import draw

    kept = []
    really = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *args, **kw: (kept.append(self), really(self, *args, **kw))[1]
    )
    store, first, _ = filled
    records = store.rounds(first)
    draw([(store.run(first), records)], "accuracy")
    loss, metric, traffic = kept[0].axes
    thick = [line for line in loss.lines if line.get_linewidth() > 2]
    assert list(thick[0].get_ydata()) == [record.eval_loss for record in records if record.phase == "train"]
    assert len(loss.lines) == len(SITES) + 2 and len(metric.lines) == len(SITES) + 2
    gap = next(line for line in loss.lines if line.get_ydata()[2] != line.get_ydata()[2])
    assert sum(value != value for value in gap.get_ydata()) == 1
    assert traffic.get_ylabel() == "MiB per round" and traffic.get_ylim()[0] == 0


def test_a_plot_stands_many_sites_and_missing_values(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    store = RunStore(tmp_path)
    run_id = store.create_run(RunConfig(), "simulation", {})
    sites = tuple(SiteRecord(f"site-{index:02}", "ok", bytes_up=10) for index in range(20))
    store.record(run_id, replace(train_record(1), phase="head", sites=sites, eval_loss=None, metrics={}))
    done = CliRunner().invoke(cli, ["metrics", "plot", "--store", str(tmp_path), "--output", str(tmp_path / "a.png")])
    assert done.exit_code == 0 and png_size(tmp_path / "a.png")[0] > 1500


def test_a_run_without_rounds_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    RunStore(tmp_path).create_run(RunConfig(), "simulation", {})
    done = CliRunner().invoke(cli, ["metrics", "plot", "--store", str(tmp_path), "--output", str(tmp_path)])
    assert done.exit_code == 1 and "no round to draw" in done.stderr


def test_without_matplotlib_the_extra_is_named(
    giva: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = giva("metrics", "plot", "--output", tmp_path)
    assert done.exit_code == 1 and "fedgiva[plot]" in done.stderr
