"""Pretrained models made ready for a task; the only package that imports transformers.

A kind of task is one module: it loads the model, makes numbers of examples, and says what an output and a loss are.

| `task.kind` | module | examples | outputs |
|---|---|---|---|
| `classification`, `multilabel`, `regression` | `classification` | `TextRow` | logits `(n, C)` |
| `causal-lm` | `causal_lm` | `Dialogue` | −log p, tokens, right tokens `(n, 3)` |
| `seq2seq` | `seq2seq` | `Dialogue` | the same |
| `image-classification` | `image_classification` | `ImageRow` | logits `(n, C)` |
"""

from __future__ import annotations

import importlib

from ..config import RunConfig
from .classification import MeanPoolingClassifier, label_tensor
from .task import Batch, Encoded, TaskModel

__all__ = ["KINDS", "Batch", "Encoded", "MeanPoolingClassifier", "TaskModel", "label_tensor", "load_task_model"]

#: The module of each kind of task.
KINDS = {
    "classification": "classification",
    "multilabel": "classification",
    "regression": "classification",
    "causal-lm": "causal_lm",
    "seq2seq": "seq2seq",
    "image-classification": "image_classification",
}


def load_task_model(config: RunConfig) -> TaskModel:
    """Load `config.model` for the kind of task that `config.task` names.

    Frozen weights have the type `model.dtype`, a head is float32. Head parameters that the checkpoint does not bring
    (or brings for another number of outputs) start at `uniform(-1, 1) / sqrt(fan_in)` from `giva.seed` and the
    parameter's name; others are kept.

    Raises:
        ConfigError: No such model, a hub id where only local files are allowed, weights that are not safetensors or
            do not fit the architecture or the kind of task, or a task without labels.
        DependencyError: The kind of task needs a package that is not installed.
    """
    module = importlib.import_module(f".{KINDS[config.task.kind]}", __name__)
    task: TaskModel = module.load(config)
    return task
