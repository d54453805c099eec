"""An adapter as a LoRA in PEFT's file format, exactly: what every server of LoRA reads.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685: ΔW = (alpha / r) lora_B lora_A. The
ΔW = diag(lambda_o) B diag(lambda_s) A of GiVA has this form as it stands, and so has the residual R of mode `exact`:

    lora_A = A (r, d_in),   lora_B = (lambda_o lambda_sᵀ + R) ∘ B (d_out, r),   alpha = r

Nothing is factorised and nothing is lost but one rounding to float32 in each entry of `lora_B`. Files are written with
numpy and safetensors; neither PEFT nor torch is needed.

    adapter_config.json         what PEFT's `LoraConfig` needs
    adapter_model.safetensors   `base_model.model.<layer>.lora_A.weight`, `….lora_B.weight`, and the head's arrays
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from .aggregate import RESIDUAL, layer_coefficients
from .bank_files import new_folder
from .checkpoint import Adapter, load_adapter
from .errors import CheckpointError
from .model_card import is_plain_model, lora_card
from .paths import expand
from .types import Arrays

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

#: PEFT's name of the task, by `task.kind`, for models with transformers' own head; PEFT has none for images.
TASK_TYPES = {
    "classification": "SEQ_CLS",
    "multilabel": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}

#: Architectures whose layers are transformers' `Conv1D`: their weight is `(d_in, d_out)`.
CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")

#: How PEFT names the matrices inside a model, where the `lora` baseline took their names from.
_INSIDE_A, _INSIDE_B = ".lora_A.default.weight", ".lora_B.default.weight"
_PREFIX = "base_model.model."

#: Heads that PEFT wraps whole wherever a model classifies texts, whatever is asked of it.
_PEFT_HEADS = ("classifier", "score")


def lora_to_folder(adapter_folder: str | Path, output: str | Path, model_path: str | Path = "") -> Path:
    """Write an adapter as an exact LoRA: what `peft.PeftModel.from_pretrained` and servers of LoRA load.

    No weight is read, so this takes no time and no memory, whatever the size of the model.

    Args:
        adapter_folder: As `save_adapter` wrote it.
        output: The new folder; it must not exist, or be empty. It appears complete or not at all.
        model_path: The base model, where it is at hand; only its `config.json` is looked at, for the layout of its
            weights. PEFT finds that out by itself too, with a warning.

    Returns:
        `output`, with `adapter_config.json`, `adapter_model.safetensors` and a model card.

    Raises:
        CheckpointError: The adapter is damaged or has no low-rank form, or the folder cannot be written.
    """
    output = Path(output)
    adapter = load_adapter(adapter_folder)
    with new_folder(output) as staged:
        write_lora(staged, adapter, fan_in_fan_out=_architecture(model_path) in CONV1D_MODELS)
        (staged / "README.md").write_text(lora_card(adapter), encoding="utf-8")
    return output


def lora_matrices(adapter: Adapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`lora_A (r, d_in)` and `lora_B (d_out, r)` by layer, float32, such that `ΔW = lora_B lora_A`.

    Args:
        adapter: With bases, or one whose matrices are PEFT's already; their scale goes into `lora_B`.

    Raises:
        CheckpointError: The adapter changes no layer but the head.
    """
    config = adapter.metadata.config
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if adapter.bases is not None:
        for name, layer in adapter.bases.layers.items():
            kept = adapter.residual.get(f"{name}.{RESIDUAL}")
            found[name] = (layer.A, layer_coefficients(adapter.arrays, adapter.bases, name, kept))
    elif config.method in ("lora", "rolora"):  # of the others a part is drawn or made of the weight, or lies in it
        lora = config.lora
        layers = [name.removesuffix(_INSIDE_A) for name in adapter.arrays if name.endswith(_INSIDE_A)]
        scale = np.float32(lora.alpha / lora.rank)
        found = {name: (adapter.arrays[name + _INSIDE_A], scale * adapter.arrays[name + _INSIDE_B]) for name in layers}
    if not found:
        raise CheckpointError(
            "the adapter has no low-rank form",
            got=f"method '{config.method}'",
            expected="an adapter of method giva, lora, rolora, or lora-xs on the gradient's bases",
            remedy="merge it into its base model instead: --format merged",
        )
    return {name: (_float32(A), _float32(B)) for name, (A, B) in found.items()}


def write_lora(folder: str | Path, adapter: Adapter, *, fan_in_fan_out: bool = False) -> None:
    """Write an adapter into an existing folder, as `PeftModel.from_pretrained` reads it.

    Args:
        folder: Where to.
        adapter: From `load_adapter`.
        fan_in_fan_out: The base model's layers are transformers' `Conv1D`, whose weight is `(d_in, d_out)`. PEFT finds
            that out by itself, with a warning.

    Raises:
        CheckpointError: The adapter has no low-rank form, or trained something that PEFT cannot place.
    """
    matrices = lora_matrices(adapter)
    tensors: Arrays = {}
    for name, (A, B) in matrices.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = A, B
    modules, state = _saved_modules(adapter)
    tensors.update({f"{_PREFIX}{name}": value for name, value in state.items()})
    ranks = {name: A.shape[0] for name, (A, _) in matrices.items()}
    settings = _settings(adapter, ranks, modules, fan_in_fan_out)
    folder = Path(folder)
    (folder / WEIGHTS_FILE).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settings(adapter: Adapter, ranks: dict[str, int], modules: list[str], fan_in_fan_out: bool) -> dict[str, Any]:
    config = adapter.metadata.config
    r = max(ranks.values())
    # alpha follows the rank, so that the scale is 1 in every layer; the patterns are regular expressions of PEFT's
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(config.task.kind) if is_plain_model(config.task) else None,
        "base_model_name_or_path": config.model.path,
        "revision": config.model.revision or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(ranks),
        "modules_to_save": modules or None,
    }


def _saved_modules(adapter: Adapter) -> tuple[list[str], Arrays]:
    """The modules that were trained whole, and their arrays."""
    known = adapter.metadata
    vectors = known.schema.vector_shapes()
    state = {
        name: value
        for name, value in adapter.arrays.items()
        if name not in vectors and not name.endswith((_INSIDE_A, _INSIDE_B))
    }
    candidates = dict.fromkeys(map(_wrapped, (*known.head_modules, *known.config.giva.modules_to_save)))
    modules = [module for module in candidates if any(name.startswith(f"{module}.") for name in state)]
    if strangers := [name for name in state if not name.startswith(tuple(f"{module}." for module in modules))]:
        raise CheckpointError(
            f"'{strangers[0]}' was trained, but belongs to no module that PEFT could save whole",
            expected=f"arrays inside {', '.join(candidates) or 'named head modules'}",
            cause="an adapter saved without the names of its head modules",
            remedy="save it with head_modules, or merge it into its base model: --format merged",
        )
    return modules, state


def _wrapped(module: str) -> str:
    """A part of a head as the head, since PEFT would wrap both, and then not find the part's arrays."""
    head = module.partition(".")[0]
    return head if head in _PEFT_HEADS else module


def _architecture(model_path: str | Path) -> str:
    """`model_type` of a model folder; empty where there is none."""
    path = expand(str(model_path)) / "config.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("model_type", "")) if path.is_file() else ""


def _float32(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value, dtype=np.float32)
