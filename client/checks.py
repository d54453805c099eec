"""What `giva site check` tries before a site joins: the data, the models, the bases, the network. It joins nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from giva_core.config import ANSWER_TASKS, DataConfig, RunConfig, TaskConfig
from giva_core.errors import DataError, GivaError

from .needs import require_methods, require_training
from .site_file import SiteFile

_PACKAGES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        what: What was tried.
        ok: Whether a worker could work with it.
        found: What was found, or what is wrong with it.
    """

    what: str
    ok: bool
    found: str


def check_site(path: Path, run: RunConfig | None = None) -> list[Check]:
    """Try everything that a run would need.

    Args:
        path: The site file.
        run: A run's configuration, to check labels and policy against, and to take the models' digests with.

    Raises:
        ConfigError: The site file cannot be used; nothing else is tried then.
    """
    site = SiteFile.read(path)
    checks = [Check("site file", True, f"site {site.name}; models: {', '.join(site.models)}")]
    checks += [_network(site), _methods(site)]
    checks += [_rows(site, name, run) for name in (site.data.train_file, site.data.eval_file) if name]
    checks += [_model(site, name, run) for name in site.models]
    checks += [_bases()]
    if run:
        checks += [_policy(site, run)]
    return checks


def _tried(what: str, error: GivaError) -> Check:
    return Check(what, False, str(error))


def _policy(site: SiteFile, run: RunConfig) -> Check:
    try:
        site.policy.check_run(run)
        site.local_config(run)
    except GivaError as error:
        return _tried("the run and the policy", error)
    shares = run.task.share_counts
    counts = "are sent" if shares and site.policy.allow_share_counts else "stay here"
    asked = "asks" if shares else "does not ask"
    found = f"allowed, as far as its configuration tells; it {asked} for counts by class, which {counts}"
    return Check("the run and the policy", True, found)


def _rows(site: SiteFile, name: str, run: RunConfig | None) -> Check:
    from .data import RowStream

    path = Path(site.data.folder) / name
    try:
        if run:
            return Check(name, True, f"{sum(1 for _ in RowStream(path, run.task, site.data))} rows")
        count, columns = _count_rows(path, site.data)
        what = f"{count} rows of {' and '.join(columns)}"
        return Check(name, True, f"{what}; --config RUN.toml checks what is in them, too")
    except GivaError as error:
        return _tried(name, error)


def _methods(site: SiteFile) -> Check:
    try:
        require_methods(site.policy.methods)
    except GivaError as error:
        return _tried("methods", error)
    return Check("methods", True, ", ".join(site.policy.methods))


def _count_rows(path: Path, data: DataConfig) -> tuple[int, list[str]]:
    """Rows that have the site's columns, and these, whatever is in them: what a label may be is for a run to say.

    Raises:
        DataError: The file cannot be read, or a row lacks a column.
    """
    from .file_formats import open_rows
    from .row_parsers import column_sets

    known = column_sets(data)
    every = list(dict.fromkeys(column for columns in known for column in columns))
    columns: list[str] = []
    count = 0
    try:
        for line, row in open_rows(path, [], optional=every, image_columns=(data.image_column, data.label_column)):
            if isinstance(row, str):
                raise DataError(f"{path} has a row that cannot be read", got=f"line {line}: {row}")
            columns = columns or next((found for found in known if row.keys() >= set(found)), known[0])
            if missing := [column for column in columns if row.get(column) is None]:
                raise DataError(f"{path} has a row without {' and '.join(missing)}", got=f"line {line}")
            count += 1
    except OSError as error:
        raise DataError(
            f"{path} cannot be read", got=error.strerror, remedy="correct [data] in the site file"
        ) from None
    if count == 0:
        raise DataError(f"{path} holds no examples", expected="at least one row")
    return count, columns


def _model(site: SiteFile, name: str, run: RunConfig | None) -> Check:
    what, model = f"model {name}", site.models[name]
    if run is None:
        run = RunConfig(task=TaskConfig(kind=_likely_kind(site, Path(model.path))))
    try:
        require_training()
        from giva_core.models import load_task_model

        local = site.local_config(replace(run, model=replace(run.model, path=name)))
        labels = run.task.labels or (() if run.task.kind in ANSWER_TASKS else ("a", "b"))
        digest = load_task_model(replace(local, task=replace(run.task, labels=labels))).weights_digest()
    except GivaError as error:
        return _tried(what, error)
    if model.digest and model.digest != digest:
        return Check(what, False, f"{digest} is not the digest in the site file")
    held = "" if model.digest else "; the site file does not hold it to one"
    return Check(what, True, f"digest {digest} for task.kind = {run.task.kind}{held}")


def _likely_kind(site: SiteFile, model: Path) -> str:
    """The kind of task of a run that uses this model on the site's rows; the model's digest depends on it."""
    from .row_parsers import answer_columns

    if (model / "preprocessor_config.json").is_file():  # a model of images has other settings than one of texts
        return "image-classification"
    try:
        _, columns = _count_rows(Path(site.data.folder) / site.data.train_file, site.data)
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (GivaError, OSError, ValueError):  # told where rows and model are checked
        return "classification"
    if columns not in answer_columns(site.data):
        return "classification"
    return "seq2seq" if isinstance(settings, dict) and settings.get("is_encoder_decoder") else "causal-lm"


def _bases() -> Check:
    from giva_core import selftest

    result = selftest.run()
    found = "the same as on every machine" if result.passed else "other than on other machines: `giva bases self-test`"
    return Check("bases", result.passed, found)


def _network(site: SiteFile) -> Check:
    """Whether a process like the worker can leave the network, tried by one that then ends."""
    if site.worker.network == "host":
        return Check("network", True, "worker.network = host: the worker stays in it")
    code = "from client.isolation import leave_network as leave; print(leave())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(_PACKAGES)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Check("network", True, f"the worker can leave it: {done.stdout.strip()}")
    return Check("network", False, done.stderr.strip().splitlines()[-1])
