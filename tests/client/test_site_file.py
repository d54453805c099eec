"""A site's own file: what it may say, and that it comes before the run's word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client.policy import Policy, PolicyError
from client.site_file import SiteFile, describe
from giva_core.config import DataConfig, RunConfig
from giva_core.errors import ConfigError, public_reason

MINIMAL: dict[str, Any] = {
    "name": "hospital-a",
    "data": {"folder": "rows"},
    "models": {"MiniLM-v2.1": {"path": "/srv/model"}},
}


def site(**tables: Any) -> SiteFile:
    return SiteFile.from_tables({**MINIMAL, **tables}, Path("/etc/giva"))


def test_every_key_has_a_default_but_four() -> None:
    found = site()
    assert found.name == "hospital-a" and found.policy == Policy()
    assert found.data == DataConfig(folder="/etc/giva/rows")
    assert (found.worker.socket, found.worker.network, found.worker.queue) == ("/run/giva/worker.sock", "none", 4)
    assert found.superlink.address == "" and found.superlink.key == ""


def test_a_file_says_everything(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(
        """
        name = "a"
        [data]
        folder = "rows"
        train-file = "rows.csv"
        eval-file = ""
        text-column = "report"
        [models.small]
        path = "$GIVA_HOME/models/small"
        digest = "abc"
        [policy]
        methods = ["giva"]
        tasks = ["regression"]
        max-local-epochs = 2
        hours = "20:00-06:00"
        metrics = ["mse"]
        [worker]
        socket = "w.sock"
        cache = "/var/cache/giva"
        memory-gib = 1.5
        queue = 0
        network = "host"
        [superlink]
        address = "link:8000"
        root-certificates = "ca.crt"
        key = "/etc/giva/site.key"
        """,
        encoding="utf-8",
    )
    found = SiteFile.read(path)
    assert (found.data.folder, found.data.train_file, found.data.eval_file) == (f"{tmp_path}/rows", "rows.csv", "")
    assert found.models["small"].path.endswith("/giva/models/small") and found.models["small"].digest == "abc"
    assert (found.policy.methods, found.policy.max_local_epochs, found.policy.metrics) == (("giva",), 2.0, ("mse",))
    assert (found.worker.socket, found.worker.cache) == (f"{tmp_path}/w.sock", "/var/cache/giva")
    assert (found.superlink.root_certificates, found.superlink.key) == (f"{tmp_path}/ca.crt", "/etc/giva/site.key")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"name": ""}, "has no name"),
        ({"name": "a b"}, "other characters"),
        ({"name": 3}, "name in the site file has the wrong type; got 3; expected a text"),
        ({"data": {}}, "has no data"),
        ({"data": {"text-column": "x"}}, "has no data.folder"),
        ({"data": "rows"}, "data in the site file has the wrong type.*a table"),
        ({"models": {}}, "has no models"),
        ({"models": {"a": {}}}, r"has no models\.a\.path"),
        ({"models": {"a": {"paht": "/m"}}}, r"no key 'models\.a\.paht'; expected 'models\.a\.path'"),
        ({"models": {"a": {"path": 1}}}, r"models\.a\.path in the site file has the wrong type"),
        ({"polcy": {}}, "no key 'polcy'; expected 'policy'"),
        (
            {"policy": {"min-eval-example": 50}},
            r"no key 'policy.min-eval-example'; expected 'policy.min-eval-examples'",
        ),
        ({"policy": {"allowed-methods": ["lora"]}}, "no key 'policy.allowed-methods'"),
        ({"policy": {"min_eval_examples": 50}}, "no key 'policy.min_eval_examples'"),
        ({"policy": {"min-eval-examples": 2.5}}, "policy.min-eval-examples in the site file has the wrong type"),
        ({"policy": {"min-eval-examples": True}}, "policy.min-eval-examples in the site file has the wrong type"),
        ({"policy": {"min-eval-examples": -1}}, "policy.min-eval-examples is too small"),
        ({"policy": {"max-sketch-share": float("nan")}}, "policy.max-sketch-share is not a finite number"),
        ({"policy": {"allow-share-counts": "true"}}, "policy.allow-share-counts in the site file has the wrong type"),
        ({"policy": {"methods": "giva"}}, "policy.methods in the site file is no list of names"),
        ({"policy": {"methods": ["giva", "half"]}}, "policy.methods names what there is not; got half"),
        ({"policy": {"tasks": ["images"]}}, "policy.tasks names what there is not"),
        ({"policy": {"metrics": ["f2"]}}, "policy.metrics names what there is not"),
        ({"policy": {"hours": "20-6"}}, "policy.hours is no span of time"),
        ({"policy": {"hours": "24:00-06:00"}}, "policy.hours is no span of time"),
        ({"worker": {"network": "some"}}, "worker.network is not a known choice"),
        ({"worker": {"task-seconds": 0}}, "worker.task-seconds is too small"),
        ({"worker": {"queue": 1000}}, "worker.queue is too large"),
        ({"policy": {"allow-model-hub": True}}, "a worker without a network cannot ask a model hub"),
    ],
)
def test_what_a_site_file_cannot_say(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        site(**tables)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no site file"):
        SiteFile.read(tmp_path / "site.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        SiteFile.read(tmp_path)
    (tmp_path / "site.toml").write_text("name = hospital", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        SiteFile.read(tmp_path / "site.toml")


def test_the_site_chooses_folder_files_and_device() -> None:
    own = site(data={"folder": "/srv/rows", "text-column": "report"}, worker={"device": "cuda:1"})
    run = RunConfig.from_flat(
        {"model.path": "/theirs/MiniLM-v2.1", "data.train-file": "/etc/passwd", "data.label-column": "y"}
    ).replace(train__device="cpu")
    found = own.settings(run)
    assert (found.name, found.train_path, found.device) == ("hospital-a", Path("/srv/rows/train.jsonl"), "cuda:1")
    assert (found.data.text_column, found.data.label_column, found.data.folder) == ("report", "label", "")
    assert found.policy == Policy() and found.model_digest == ""


@pytest.mark.parametrize("path", ["MiniLM-v2.1", "$GIVA_HOME/models/MiniLM-v2.1", "org/MiniLM-v2.1", "/x/MiniLM-v2.1/"])
def test_a_run_s_model_is_one_of_the_site_s_by_its_name(path: str) -> None:
    run = RunConfig.from_flat({"model.path": path, "model.local-files-only": False})
    own = site().local_config(run)
    assert (own.model.path, own.model.local_files_only) == ("/srv/model", True)
    assert own.digest() == run.digest()


@pytest.mark.parametrize("path", ["", "/etc", "MiniLM", "/srv/MiniLM-v2.1/..", "minilm-v2.1"])
def test_other_models_are_refused_without_their_names(path: str) -> None:
    with pytest.raises(PolicyError) as caught:
        site().settings(RunConfig.from_flat({"model.path": path}))
    assert public_reason(caught.value) == "policy: the site's models do not include the run's"


def test_a_hub_is_asked_where_run_and_site_allow_it(tmp_path: Path) -> None:
    tables = {"policy": {"allow-model-hub": True}, "worker": {"network": "host"}}
    own = site(models={"small": {"path": "org/small"}, "here": {"path": str(tmp_path)}}, **tables)
    asked = RunConfig.from_flat({"model.path": "small", "model.local-files-only": False})
    assert (own.local_config(asked).model.path, own.local_config(asked).model.local_files_only) == ("org/small", False)
    assert own.local_config(asked.replace(model__local_files_only=True)).model.local_files_only
    assert own.models["here"].path == str(tmp_path)


def test_every_key_is_described() -> None:
    keys = [key for key, _, _ in describe()]
    may_be_empty = ("data.", "models.", "policy.hours", "superlink.")
    assert len(keys) == len(set(keys)) and {"name", "data.folder", "policy.hours", "worker.queue"} <= set(keys)
    assert all(default or key.startswith(may_be_empty) for key, default, _ in describe())
