"""An adapter back into a model: applied for use and further training, or merged into a plain transformers folder.

Merging writes `W' = W + diag(lambda_o) B diag(lambda_s) A` (and a residual, where mode `exact` kept one), added in
float32 and rounded once to the type of the frozen weights.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from . import inject
from .aggregate import RESIDUAL
from .checkpoint import Adapter, load_adapter, sync_folder
from .config import RunConfig
from .errors import CheckpointError
from .models import TaskModel, load_task_model
from .peft_lora import inject_lora


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
        inject.inject(task.model, adapter.bases, known.config.giva.dropout, trainable=heads)
        inject.write_vectors(task.model, {name: adapter.arrays[name] for name in vectors})
        residual = {name.removesuffix(f".{RESIDUAL}"): value for name, value in adapter.residual.items()}
        inject.write_residual(task.model, residual)
    elif known.config.method == "lora":
        layers, _ = inject.layer_shapes(task.model, known.config.giva, exclude=heads)
        inject_lora(task.model, layers, known.config)
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is not empty", expected="a new folder", remedy="choose another output folder")
    adapter = load_adapter(adapter_folder)
    task = load_task_model(adapter.metadata.config.replace(model__path=str(model_path)))
    base_digest = task.weights_digest()  # of the weights before they change
    apply_adapter(task, adapter)
    _merge(task.model)
    staged = output.parent / f".{output.name}.{secrets.token_hex(4)}.tmp"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        task.save(staged)
        (staged / "README.md").write_text(_model_card(adapter, base_digest), encoding="utf-8")
        for path in staged.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if output.exists():
            output.rmdir()
        os.replace(staged, output)
        sync_folder(output.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the merged model could not be written to {output}",
            got=error,
            cause="a full disk, or a folder that may not be written to",
            remedy="free space or choose another folder; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return output


def _merge(model: nn.Module) -> None:
    """Fold every adapter into the weight it sits on, and leave a plain model."""
    inject.merge(model)
    inject.remove(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):  # a PEFT layer
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())


# -- the model card ---------------------------------------------------------------------------------------------------


def _model_card(adapter: Adapter, base_digest: str) -> str:
    config, known = adapter.metadata.config, adapter.metadata
    base = config.model.path
    facts = [
        ("Base model", f"{base} (SHA-256 of the model below the head {base_digest})"),
        ("Task", f"{config.task.kind}, {max(1, len(config.task.labels))} outputs, head `{config.task.head}`"),
        ("Method", _method(config, len(known.schema.layers))),
        ("Texts cut after", f"{config.task.max_length} tokens"),
        ("Trained with", ", ".join(f"{name} {version}" for name, version in known.versions.items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    tags = "tags: [federated-learning, fedgiva]\nlibrary_name: transformers\npipeline_tag: text-classification"
    return (
        f"---\n{tags}\n---\n\n# {config.name or base}, merged\n\n"
        f"{base}, fine-tuned federatedly with fedgiva; the adapter is merged into the weights.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Use\n\n{_usage(config)}\n\n## Licence and limits\n\n"
        "The base model's licence holds for this model too. Evaluate it on your own data before you rely on it.\n"
    )


def _method(config: RunConfig, layers: int) -> str:
    if config.method == "giva":
        giva = config.giva
        return (
            f"GiVA (arXiv:2604.21901), rank {giva.rank}, init {giva.init}, {layers} layers, mode {config.rounds.mode}"
        )
    if config.method == "lora":
        return f"LoRA (arXiv:2106.09685), rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    return "the task head alone"


def _usage(config: RunConfig) -> str:
    if config.task.head == "native":
        name, note = "AutoModelForSequenceClassification", ""
        imports = f"from transformers import {name}, AutoTokenizer"
    else:
        name = "MeanPoolingClassifier"
        imports = f"from giva_core.models import {name}\nfrom transformers import AutoTokenizer"
        note = (
            "\n\nThe head is linear on the mean-pooled, normalised sentence vector times 10. `AutoModel` loads the "
            "encoder alone; `AutoModelForSequenceClassification` would put another head on it."
        )
    load = f'model = {name}.from_pretrained("this-folder")\ntokenizer = AutoTokenizer.from_pretrained("this-folder")'
    return f"```python\n{imports}\n\n{load}\n```{note}"
