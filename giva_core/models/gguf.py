"""A GGUF file, llama.cpp's format of quantised weights, as a plain transformers folder in bfloat16."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import DependencyError
from .loading import quiet


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder that `load_task_model` reads.

    The weights are what their quantised codes stand for, rounded to bfloat16. They are de-quantised one after the
    other into float32, which takes four bytes for each of the model's numbers.

    Args:
        source: The GGUF file.
        target: An existing folder.

    Raises:
        DependencyError: The package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise DependencyError(
            "reading a GGUF file needs gguf, which is not installed", remedy="pip install 'fedgiva[gguf]'"
        )
    options = {"gguf_file": source.name, "local_files_only": True}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
        quantised: Any = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **options)
        settings = quantised.config
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config  # with it the model could not be saved
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = quantised.generation_config
        plain.save_pretrained(target, safe_serialization=True)
        tokenizer.save_pretrained(target)
