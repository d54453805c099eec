"""`giva adapter` and `giva bases`: what an adapter holds, and whether it can be trusted."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from filled_store import fill
from safetensors.numpy import load_file

from giva_core import bank_files, checkpoint, selftest
from giva_core.bases import bases_digest
from giva_core.config import RunConfig
from giva_core.protocol import arrays_digest
from giva_core.types import Arrays, Bases, BasesSet
from server.cli.main import cli
from server.run_store import RunStore


def make_bases() -> BasesSet:
    rng = np.random.default_rng(5)
    layers = {}
    for name, (d_out, d_in, r) in {"encoder.query": (7, 5, 3), "encoder.value": (6, 9, 2)}.items():
        A = np.linalg.qr(rng.standard_normal((d_in, r)))[0].T.astype(np.float32)
        B = np.linalg.qr(rng.standard_normal((d_out, r)))[0].astype(np.float32)
        layers[name] = Bases(np.ascontiguousarray(A), np.ascontiguousarray(B))
    return BasesSet(layers, "rand", bases_digest(layers, "rand"))


def make_arrays(bases: BasesSet) -> Arrays:
    rng = np.random.default_rng(6)
    arrays: Arrays = {"classifier.weight": rng.standard_normal((2, 5)).astype(np.float32)}
    for name, pair in bases.layers.items():
        arrays[f"{name}.lambda_o"] = rng.standard_normal(len(pair.B)).astype(np.float32)
        arrays[f"{name}.lambda_s"] = rng.standard_normal(len(pair.A)).astype(np.float32)
    return arrays


@pytest.fixture
def finished(tmp_path: Path) -> tuple[RunStore, str, BasesSet, Arrays]:
    """A store whose older run has an adapter, as a finished run has."""
    store, run_id, _ = fill(tmp_path / "store")
    bases = make_bases()
    arrays = make_arrays(bases)
    folder = store.adapter_folder(run_id)
    config = store.run(run_id).config.replace(model__path="/models/tiny-bert")
    checkpoint.save_adapter(folder, bases, arrays, config, model_digest="cd" * 32, head_modules=["classifier"])
    store.set_facts(run_id, {"bases_digest": bases.digest, "arrays_digest": arrays_digest(arrays)})
    return store, run_id, bases, arrays


@pytest.fixture
def giva(finished: tuple[RunStore, str, BasesSet, Arrays]) -> Callable[..., Result]:
    environment = {"GIVA_STORE": str(finished[0].root)}
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments], env=environment)


def data_of(done: Result, kind: str, exit_code: int = 0) -> dict[str, Any]:
    assert done.exit_code == exit_code, done.stderr
    envelope = json.loads(done.stdout)
    assert envelope["kind"] == kind
    return envelope["data"]


def test_adapter_show(giva: Callable[..., Result], finished: tuple[RunStore, str, BasesSet, Arrays]) -> None:
    store, run_id, bases, arrays = finished
    data = data_of(giva("adapter", "show", run_id, "--json"), "adapter-show")
    assert set(data) == {
        *("folder", "method", "base_model", "model_digest", "init", "bases_digest", "mode", "task", "labels"),
        *("parameters", "has_residual", "head_modules", "versions", "layers"),
    }
    assert data["parameters"] == {"vectors": 7 + 3 + 6 + 2, "other": 10}
    assert data["base_model"] == "tiny-bert" and data["bases_digest"] == bases.digest
    query = data["layers"][0]
    assert {key: query[key] for key in ("name", "d_out", "d_in", "rank")} == {
        "name": "encoder.query", "d_out": 7, "d_in": 5, "rank": 3,
    }  # fmt: skip
    pair = bases.layers["encoder.query"]
    delta = np.diag(arrays["encoder.query.lambda_o"]) @ pair.B @ np.diag(arrays["encoder.query.lambda_s"]) @ pair.A
    assert query["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    shown = giva("adapter", "show", store.adapter_folder(run_id)).stdout
    assert "tiny-bert" in shown and "encoder.value" in shown and bases.digest in shown


def test_the_residual_counts_in_the_norm(tmp_path: Path) -> None:
    bases = make_bases()
    arrays = make_arrays(bases)
    residual = {f"{name}.residual": np.full(pair.B.shape, 0.5, np.float32) for name, pair in bases.layers.items()}
    config = fill(tmp_path / "store")[0].run("last").config.replace(rounds__mode="exact")
    folder = checkpoint.save_adapter(tmp_path / "adapter", bases, arrays, config, residual=residual)
    data = data_of(CliRunner().invoke(cli, ["adapter", "show", str(folder), "--json"]), "adapter-show")
    B, A = bases.layers["encoder.value"].B, bases.layers["encoder.value"].A
    M = np.outer(arrays["encoder.value.lambda_o"], arrays["encoder.value.lambda_s"]) + 0.5
    assert data["has_residual"] is True
    assert data["layers"][1]["delta_norm"] == pytest.approx(np.linalg.norm((M * B) @ A), rel=1e-5)


def test_adapter_verify(giva: Callable[..., Result], finished: tuple[RunStore, str, BasesSet, Arrays]) -> None:
    data = data_of(giva("adapter", "verify", finished[1], "--json"), "adapter-verify")
    assert set(data) == {"folder", "ok", "checks"} and data["ok"] is True
    assert [check["check"] for check in data["checks"]] == [
        "files are whole and belong together",
        "all values are finite",
        "bases digest is the run's",
        "arrays digest is the run's",
    ]
    assert "The adapter is sound." in giva("adapter", "verify", finished[1]).stdout


def test_adapter_verify_notices_damage(
    giva: Callable[..., Result], finished: tuple[RunStore, str, BasesSet, Arrays]
) -> None:
    file = finished[0].adapter_folder(finished[1]) / "vectors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    data = data_of(giva("adapter", "verify", finished[1], "--json"), "adapter-verify", exit_code=1)
    assert data["ok"] is False and "vectors.safetensors" in data["checks"][0]["detail"]


def test_adapter_verify_notices_foreign_bases(
    giva: Callable[..., Result], finished: tuple[RunStore, str, BasesSet, Arrays]
) -> None:
    bases = make_bases()
    turned = {name: replace(pair, B=np.ascontiguousarray(-pair.B)) for name, pair in bases.layers.items()}
    checkpoint.save_bases(
        finished[0].adapter_folder(finished[1]), BasesSet(turned, "rand", bases_digest(turned, "rand"))
    )
    data = data_of(giva("adapter", "verify", finished[1], "--json"), "adapter-verify", exit_code=1)
    assert data["ok"] is False and "bases" in data["checks"][0]["detail"]


def test_adapter_verify_notices_an_adapter_of_another_run(
    giva: Callable[..., Result], finished: tuple[RunStore, str, BasesSet, Arrays]
) -> None:
    finished[0].set_facts(finished[1], {"arrays_digest": "00" * 32})
    done = giva("adapter", "verify", finished[1])
    assert done.exit_code == 1 and "but the run recorded 000000000000…" in done.stdout


def test_adapter_verify_notices_values_that_are_not_finite(tmp_path: Path) -> None:
    bases = make_bases()
    arrays = make_arrays(bases)
    arrays["encoder.query.lambda_s"][1] = np.inf
    config = fill(tmp_path / "store")[0].run("last").config
    folder = checkpoint.save_adapter(tmp_path / "adapter", bases, arrays, config)
    data = data_of(CliRunner().invoke(cli, ["adapter", "verify", str(folder), "--json"]), "adapter-verify", exit_code=1)
    assert data["checks"][1] == {"check": "all values are finite", "ok": False, "detail": "encoder.query.lambda_s"}


def test_a_run_without_an_adapter_says_how_to_get_one(giva: Callable[..., Result]) -> None:
    done = giva("adapter", "show", "last")
    assert done.exit_code == 1 and "has no adapter" in done.stderr and "giva run resume" in done.stderr


def test_a_folder_that_is_no_adapter_is_named(giva: Callable[..., Result], tmp_path: Path) -> None:
    done = giva("adapter", "show", tmp_path / "nothing" / "here")
    assert done.exit_code == 1 and f"{tmp_path}/nothing/here" in done.stderr


def test_adapter_merge_takes_the_model_of_the_run(
    giva: Callable[..., Result],
    finished: tuple[RunStore, str, BasesSet, Arrays],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    calls = []
    export = types.ModuleType("giva_core.export")  # the real one imports transformers; its own tests are elsewhere
    merge = lambda folder, model, output: calls.append((folder, model)) or output  # noqa: E731
    monkeypatch.setattr(export, "merge_to_folder", merge, raising=False)
    monkeypatch.setitem(sys.modules, "giva_core.export", export)
    store, run_id, *_ = finished
    folder = store.adapter_folder(run_id)
    data = data_of(
        giva("adapter", "merge", run_id, "--model", "m", "--output", tmp_path / "out", "--json"), "adapter-merge"
    )
    assert data == {"adapter": str(folder), "model": "m", "output": str(tmp_path / "out")}
    giva("adapter", "merge", run_id, "--output", tmp_path / "out")
    assert calls == [(folder, "m"), (folder, store.run(run_id).config.model.path)]
    lost = giva("adapter", "merge", folder, "--output", tmp_path / "out")
    assert lost.exit_code == 2 and "--model" in lost.stderr


def test_adapter_export_writes_a_lora_without_torch(
    giva: Callable[..., Result],
    finished: tuple[RunStore, str, BasesSet, Arrays],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("torch", "transformers", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    _, run_id, bases, arrays = finished
    output = tmp_path / "lora"
    data = data_of(
        giva("adapter", "export", run_id, "--format", "lora", "--output", output, "--json"), "adapter-export"
    )
    assert set(data) == {"adapter", "format", "model", "output", "task"} and data["format"] == "lora"
    tensors = load_file(output / "adapter_model.safetensors")
    name, pair = next(iter(bases.layers.items()))
    lora = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
    delta = np.diag(arrays[f"{name}.lambda_o"]) @ pair.B @ np.diag(arrays[f"{name}.lambda_s"]) @ pair.A
    np.testing.assert_allclose(lora, delta, rtol=0, atol=1e-6)
    again = giva("adapter", "export", run_id, "--format", "lora", "--output", output)
    assert again.exit_code == 1 and "not empty" in again.stderr


def test_adapter_export_puts_tasks_into_a_bank(
    giva: Callable[..., Result], finished: tuple[RunStore, str, BasesSet, Arrays], tmp_path: Path
) -> None:
    store, run_id, bases, _ = finished
    bank = tmp_path / "bank"
    export = ("adapter", "export", run_id, "--format", "giva", "--output", bank)
    data = data_of(giva(*export, "--json"), "adapter-export")
    name = store.run(run_id).config.name or run_id
    assert data["task"] == name and data["output"] == str(bank / "tasks" / name)
    assert giva(*export, "--name", "second").exit_code == 0
    assert bank_files.list_tasks(bank) == {name: bases.digest, "second": bases.digest}
    taken, wrong = giva(*export), giva(*export, "--name", "../out")
    assert taken.exit_code == wrong.exit_code == 1 and "--name" in wrong.stderr and "--name" in taken.stderr
    for folder in (bank, bank / "tasks" / name):
        for command in (("adapter", "show"), ("adapter", "verify"), ("bases", "show")):
            assert "AdapterBank.open" in giva(*command, folder).stderr


def test_adapter_export_tells_of_tasks_on_other_bases(
    giva: Callable[..., Result], finished: tuple[RunStore, str, BasesSet, Arrays], tmp_path: Path
) -> None:
    store, run_id, bases, arrays = finished
    turned = {name: replace(pair, B=np.ascontiguousarray(-pair.B)) for name, pair in bases.layers.items()}
    others = BasesSet(turned, "rand", bases_digest(turned, "rand"))
    other = checkpoint.save_adapter(tmp_path / "other", others, arrays, store.run(run_id).config)
    export = ("--format", "giva", "--output", tmp_path / "bank")
    assert "other bases" not in giva("adapter", "export", other, *export).stdout
    told = " ".join(giva("adapter", "export", run_id, *export, "--name", "second").stdout.split())
    assert "1 of its 2 tasks are on other bases (other)" in told


def test_adapter_export_merges_as_merge_does(
    giva: Callable[..., Result],
    finished: tuple[RunStore, str, BasesSet, Arrays],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    export = types.ModuleType("giva_core.export")
    monkeypatch.setattr(export, "merge_to_folder", lambda folder, model, output: output, raising=False)
    monkeypatch.setitem(sys.modules, "giva_core.export", export)
    store, run_id, *_ = finished
    options = ("--format", "merged", "--output", tmp_path / "out")
    data = data_of(giva("adapter", "export", run_id, *options, "--json"), "adapter-export")
    assert data["model"] == store.run(run_id).config.model.path and data["format"] == "merged"
    lost = giva("adapter", "export", store.adapter_folder(run_id), *options)
    assert lost.exit_code == 2 and "--model" in lost.stderr
    named = giva("adapter", "export", run_id, *options, "--name", "task")
    assert named.exit_code == 2 and "--format giva" in named.stderr


def test_bases_show(giva: Callable[..., Result], finished: tuple[RunStore, str, BasesSet, Arrays]) -> None:
    _, run_id, bases, _ = finished
    data = data_of(giva("bases", "show", run_id, "--json"), "bases-show")
    assert set(data) == {"folder", "init", "digest", "layers"} and data["digest"] == bases.digest
    assert set(data["layers"][0]) == {"name", "d_out", "d_in", "rank", "a_error", "b_error"}
    assert [(layer["d_out"], layer["d_in"], layer["rank"]) for layer in data["layers"]] == [(7, 5, 3), (6, 9, 2)]
    assert all(layer["a_error"] < 1e-6 and layer["b_error"] < 1e-6 for layer in data["layers"])
    assert bases.digest in giva("bases", "show", run_id).stdout


def test_bases_show_says_which_method_has_none(giva: Callable[..., Result], tmp_path: Path) -> None:
    folder = checkpoint.save_adapter(tmp_path / "whole", None, {}, RunConfig(method="head"))
    shown = giva("bases", "show", folder)
    assert shown.exit_code == 1 and "the adapter has no bases; got method 'head'" in shown.stderr


@pytest.mark.parametrize("passed", [True, False])
def test_self_test_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch, passed: bool) -> None:
    found = selftest.SelfTest("ab", "ab" if passed else "cd", passed, "ef", "2.2.0", "openblas 0.3", "x86_64 Linux")
    monkeypatch.setattr(selftest, "run", lambda: found)
    data = data_of(CliRunner().invoke(cli, ["bases", "self-test", "--json"]), "bases-self-test", int(not passed))
    assert set(data) == {"digest", "expected", "passed", "lapack_digest", "numpy_version", "blas", "machine"}
    shown = CliRunner().invoke(cli, ["bases", "self-test"])
    assert ("must not take part" in shown.stdout) is not passed and "openblas 0.3" in shown.stdout
