"""An adapter back into a model: applied for use and further training, or merged into a plain transformers folder.

Merging writes `W' = W + diag(lambda_o) B diag(lambda_s) A` (and a residual, where mode `exact` kept one), added in
float32 and rounded once to the type of the frozen weights. The formats that need no model are elsewhere: `lora_export`
makes a LoRA of an adapter, `bank_files` keeps many adapters that share their bases.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from . import inject, methods
from .aggregate import RESIDUAL
from .bank_files import new_folder, refuse_existing
from .checkpoint import Adapter, load_adapter
from .errors import CheckpointError
from .methods.lora import add_residual
from .model_card import merged_card
from .models import TaskModel, load_task_model


def apply_adapter(task: TaskModel, adapter: Adapter) -> None:
    """Put an adapter into a plain model, in place: bases, vectors, residual and head.

    Args:
        task: The base model that the adapter was trained on, with the same task head.
        adapter: From `load_adapter`.

    Raises:
        CheckpointError: It is another base model, or has another head.
        TargetError: The model is adapted already.
    """
    known = adapter.metadata
    if known.model_digest and task.weights_digest() != known.model_digest:
        raise CheckpointError(
            "the adapter was trained on another base model",
            got=f"weights digest {task.weights_digest()[:12]}…",
            expected=f"{known.model_digest[:12]}… of '{known.config.model.path}' as {known.config.model.dtype}",
            cause="a model folder of another name, revision or model.dtype",
            remedy="name the folder of the base model that the run used",
        )
    heads = (*task.head_modules, *known.config.giva.modules_to_save)
    vectors = known.schema.vector_shapes()
    state = {name: value for name, value in adapter.arrays.items() if name not in vectors}
    if adapter.bases is not None:
        kind = methods.layer_kind(known.config)
        inject.inject(task.model, adapter.bases, known.config.giva.dropout, trainable=heads, kind=kind)
        inject.write_vectors(task.model, {name: adapter.arrays[name] for name in vectors})
        residual = {name.removesuffix(f".{RESIDUAL}"): value for name, value in adapter.residual.items()}
        inject.write_residual(task.model, residual)
    else:
        methods.prepare(task.model, known.config, heads)
        add_residual(task.model, adapter.residual, {})
    inject.write_state(task.model, state)


def merge_to_folder(adapter_folder: str | Path, model_path: str | Path, output: str | Path) -> Path:
    """Merge an adapter into its base model and write a transformers folder with tokenizer and model card.

    Args:
        adapter_folder: As `save_adapter` wrote it.
        model_path: The base model.
        output: The new folder; it must not exist, or be empty. It appears complete or not at all.

    Returns:
        `output`. `load_task_model` reads it with the run's settings; see the model card for transformers alone.

    Raises:
        CheckpointError: The adapter is damaged or of another base model, or the folder cannot be written.
        ConfigError: The base model cannot be loaded.
    """
    output = Path(output)
    refuse_existing(output)
    adapter = load_adapter(adapter_folder)
    task = load_task_model(adapter.metadata.config.replace(model__path=str(model_path)))
    base_digest = task.weights_digest()  # of the weights before they change
    apply_adapter(task, adapter)
    _merge(task.model)
    with new_folder(output) as staged:
        try:
            task.save(staged)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error
        (staged / "README.md").write_text(merged_card(adapter, base_digest), encoding="utf-8")
    return output


def _merge(model: nn.Module) -> None:
    """Fold every adapter into the weight it sits on, and leave a plain model."""
    inject.merge(model)
    inject.remove(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):  # a PEFT layer
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
