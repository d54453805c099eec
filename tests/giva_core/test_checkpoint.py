from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import safetensors.numpy

from giva_core.bases import bases_digest
from giva_core.checkpoint import load_adapter, load_bases, save_adapter, save_bases, save_vectors
from giva_core.config import DataConfig, ModelConfig, RunConfig
from giva_core.errors import BasesError, CheckpointError
from giva_core.types import Bases, BasesSet

SHAPES = {"layer.b": (7, 5, 3), "layer.a": (4, 6, 2)}  # d_out, d_in, r; the order is the model's, not the alphabet's


def make_bases(seed=0):
    rng = np.random.default_rng(seed)
    layers = {
        name: Bases(rng.normal(size=(r, d_in)).astype(np.float32), rng.normal(size=(d_out, r)).astype(np.float32))
        for name, (d_out, d_in, r) in SHAPES.items()
    }
    return BasesSet(layers, "rowalign", bases_digest(layers, "rowalign"))


def make_arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"classifier.weight": (9, 8), "classifier.bias": (9,), "classifier.scale": ()}
    for name, (d_out, _, r) in SHAPES.items():
        shapes[f"{name}.lambda_o"], shapes[f"{name}.lambda_s"] = (d_out,), (r,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_residual():
    return {f"{name}.residual": np.full((d_out, r), 0.5, np.float32) for name, (d_out, _, r) in SHAPES.items()}


CONFIG = RunConfig(
    name="demo",
    model=ModelConfig(path="/home/someone/secret/encoder"),
    data=DataConfig(folder="/home/someone/patients", text_column="diagnosis"),
)


@pytest.fixture
def folder(tmp_path):
    return save_adapter(
        tmp_path / "adapter", make_bases(), make_arrays(), CONFIG, model_digest="ab", head_modules=["classifier"]
    )


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], value)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder, **changes):
    path = folder / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_was_saved_is_loaded(folder):
    adapter = load_adapter(folder)
    bases = make_bases()
    assert list(adapter.bases.layers) == list(SHAPES)
    assert (adapter.bases.init, adapter.bases.digest) == ("rowalign", bases.digest)
    for name, layer in bases.layers.items():
        np.testing.assert_array_equal(adapter.bases.layers[name].A, layer.A)
        np.testing.assert_array_equal(adapter.bases.layers[name].B, layer.B)
    assert_equal(adapter.arrays, make_arrays())
    assert adapter.residual == {}
    known = adapter.metadata
    assert [(layer.name, layer.d_out, layer.d_in) for layer in known.schema.layers] == [
        ("layer.b", 7, 5),
        ("layer.a", 4, 6),
    ]
    assert known.schema.ranks == (3, 2)
    assert known.schema.state == {"classifier.weight": (9, 8), "classifier.bias": (9,), "classifier.scale": ()}
    assert (known.model_digest, known.head_modules, known.bases_digest) == ("ab", ("classifier",), bases.digest)
    assert known.config.digest() == CONFIG.digest()
    assert "numpy" in known.versions


def test_no_path_of_the_machine_is_written(folder):
    written = b"".join(contents(folder).values())
    assert b"someone" not in written and b"patients" not in written and b"diagnosis" not in written
    assert load_adapter(folder).metadata.config.model.path == "encoder"


def test_later_rounds_replace_the_vectors_alone(folder):
    before = contents(folder)
    save_vectors(folder, make_arrays(seed=1), residual=make_residual())
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"vectors.safetensors"}
    assert_equal(load_adapter(folder).arrays, make_arrays(seed=1))
    assert_equal(load_adapter(folder).residual, make_residual())


def test_methods_without_bases(tmp_path):
    arrays = {"query.lora_A.default.weight": np.ones((2, 6), np.float32)}
    folder = save_adapter(tmp_path, None, arrays, CONFIG.replace(method="lora"))
    adapter = load_adapter(folder)
    assert adapter.bases is None and adapter.metadata.config.method == "lora"
    assert_equal(adapter.arrays, arrays)
    assert sorted(contents(folder)) == ["adapter.json", "vectors.safetensors"]


def test_bases_alone(tmp_path):
    path = save_bases(tmp_path / "new" / "folder", make_bases())
    assert load_bases(path.parent).digest == make_bases().digest


@pytest.mark.parametrize("name", ["bases.safetensors", "vectors.safetensors"])
def test_a_changed_byte_is_found(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*Remedy"):
        load_adapter(folder)


@pytest.mark.parametrize("name", ["adapter.json", "bases.safetensors", "vectors.safetensors"])
def test_a_cut_or_missing_file_is_named(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_adapter(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_adapter(folder)


@pytest.mark.parametrize("layers", ['[["a", 1e999, 2, 1]]', "[" * 100_000], ids=["infinite size", "endless nesting"])
def test_a_hostile_description_is_refused_as_damaged(folder, layers):
    path = folder / "adapter.json"
    settings = {**json.loads(path.read_text()), "layers": "LAYERS"}
    path.write_text(json.dumps(settings).replace('"LAYERS"', layers))
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(folder)


def test_the_digest_of_the_bases_is_computed_again(tmp_path):
    bases = make_bases()
    save_bases(tmp_path, BasesSet(make_bases(seed=1).layers, bases.init, bases.digest))
    with pytest.raises(CheckpointError, match="bases digest"):
        load_bases(tmp_path)


def test_vectors_of_other_bases_are_refused(folder, tmp_path):
    other = save_adapter(tmp_path / "other", make_bases(seed=1), make_arrays(), CONFIG)
    os.replace(other / "vectors.safetensors", folder / "vectors.safetensors")
    with pytest.raises(BasesError, match=r"vectors.safetensors belongs to other bases.*Remedy"):
        load_adapter(folder)


def test_bases_of_another_adapter_are_refused(folder, tmp_path):
    other = save_adapter(tmp_path / "other", make_bases(seed=1), make_arrays(), CONFIG)
    os.replace(other / "bases.safetensors", folder / "bases.safetensors")
    with pytest.raises(CheckpointError, match=r"bases.safetensors is damaged"):
        load_adapter(folder)


def test_arrays_of_another_form_are_refused(folder):
    before = contents(folder)
    arrays = make_arrays()
    for wrong in (
        {**arrays, "layer.b.lambda_o": np.ones(6, np.float32)},
        {**arrays, "layer.c.lambda_o": np.ones(6, np.float32)},
        {name: value for name, value in arrays.items() if name != "layer.a.lambda_s"},
    ):
        with pytest.raises(CheckpointError, match="does not fit"):
            save_vectors(folder, wrong)
    with pytest.raises(CheckpointError, match=r"layer.b.residual does not fit"):
        save_vectors(folder, arrays, residual={"layer.a.residual": make_residual()["layer.a.residual"]})
    assert contents(folder) == before


def test_other_formats_and_settings_are_explained(folder):
    settings = json.loads((folder / "adapter.json").read_text())["config"]
    edit(folder, config={**settings, "giva.unheard-of": 1})
    with pytest.raises(CheckpointError, match=r"unheard-of.*another version"):
        load_adapter(folder)
    edit(folder, format=99)
    with pytest.raises(CheckpointError, match=r"format 99.*expected format 1"):
        load_adapter(folder)
    edit(folder, format=1, layers=[["x"]])
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(folder)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_the_earlier_adapter(folder, monkeypatch, failing):
    before, calls = contents(folder), []

    def full(handle):
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*full disk"):
        save_adapter(folder, make_bases(seed=1), make_arrays(seed=1), CONFIG)
    assert contents(folder) == before


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="nothing could be written"):
        save_bases(tmp_path / "file", make_bases())
    with pytest.raises(CheckpointError, match="no adapter in"):
        load_adapter(tmp_path / "nowhere")


def test_files_are_plain_safetensors(folder):
    tensors = safetensors.numpy.load_file(folder / "vectors.safetensors")
    assert_equal(tensors, make_arrays())
    assert set(safetensors.numpy.load_file(folder / "bases.safetensors")) == {
        f"{name}.{part}" for name in SHAPES for part in "AB"
    }
