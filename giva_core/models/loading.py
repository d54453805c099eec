"""From a model folder to a network whose backbone is frozen: what every kind of task does in the same way.

What a head has and the checkpoint does not bring starts at `uniform(-1, 1) / sqrt(fan_in)`, biases at zero, drawn from
the shared seed by integer arithmetic: every site starts with the same head, on every machine. `W = 0` would not do,
since no gradient reached the backbone through it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .. import exact
from ..config import RunConfig
from ..errors import ConfigError
from ..paths import expand
from ..targets import inside

#: Settings that say nothing about the frozen model: where it came from, its type (the weights show it), its task.
_NO_SETTINGS = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "num_labels", "id2label"),
    *("label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict", "use_cache"),
}


def load_processor(config: RunConfig, auto: Any) -> Any:
    """The tokenizer (or what else `auto` is) in the model's folder.

    Raises:
        ConfigError: As `load_network`.
    """
    source = find_source(config)
    with _explained(source), quiet():
        return auto.from_pretrained(source, **hub_options(config, source))


def load_settings(config: RunConfig) -> Any:
    """The model's own configuration.

    Raises:
        ConfigError: As `load_network`.
    """
    source = find_source(config)
    with _explained(source), quiet():
        return AutoConfig.from_pretrained(source, **hub_options(config, source))


def load_network(config: RunConfig, auto: Any, settings: Any) -> tuple[Any, set[str]]:
    """The network with the weights of `config.model`, in the type `model.dtype`.

    Args:
        config: The run's configuration.
        auto: The class that loads, one of transformers' `AutoModel...`.
        settings: The model's own configuration, with the task written into it.

    Returns:
        The network, and the names of the parameters that the checkpoint does not bring, or brings in another shape.

    Raises:
        ConfigError: No such model, a hub id where only local files are allowed, or weights that are not safetensors
            or do not fit the architecture.
    """
    source = find_source(config)
    with _explained(source), quiet():
        model, loaded = auto.from_pretrained(
            source,
            config=settings,
            dtype=getattr(torch, config.model.dtype),
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **hub_options(config, source),
        )
    return model, set(loaded["missing_keys"]) | {entry[0] for entry in loaded["mismatched_keys"]}


@contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"the model {source} cannot be loaded",
            got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            expected="a transformers folder with config.json, tokenizer.json and model.safetensors",
            remedy="check the folder, or convert the weights to safetensors with the model's save_pretrained",
            public="the model cannot be loaded",
        ) from error


def hub_options(config: RunConfig, source: str) -> dict[str, Any]:
    """What every load asks for: which revision, whether a hub may be asked, and no code from the model's folder."""
    options: dict[str, Any] = {"local_files_only": config.model.local_files_only, "trust_remote_code": False}
    if config.model.revision and not Path(source).is_dir():
        options["revision"] = config.model.revision
    return options


def find_source(config: RunConfig) -> str:
    """The folder to load from, or a hub id where that is allowed."""
    path = config.model.path
    if not path:
        raise ConfigError(
            "model.path is not set", expected="the folder of a pretrained model", public="the model is not set"
        )
    if expand(path).is_dir():
        return str(expand(path))
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path):
        raise ConfigError(
            f"there is no model folder {path}",
            remedy="check model.path; at a site, the path in the site's own settings",
            public="the model folder is missing",
        )
    if config.model.local_files_only:
        raise ConfigError(
            f"there is no model folder {path}, and asking a model hub for it is not allowed",
            cause="model.local-files-only is on, which is the default",
            remedy="download the model and set model.path to its folder, or set model.local-files-only = false",
            public="the model folder is missing",
        )
    return path


def settings_of(config: Any) -> dict[str, Any]:
    """The settings that decide what the model computes, without those at their class's default."""
    try:
        default = type(config)().to_dict()
    except (TypeError, ValueError):  # a composed configuration, which has no default
        default = {}
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in _NO_SETTINGS and (key not in default or value != default[key])
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off stderr; what matters in them is checked here."""
    logging = transformers.utils.logging
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


# -- head and backbone ------------------------------------------------------------------------------------------------


def prepare_heads(model: Any, new: set[str], config: RunConfig) -> tuple[str, ...]:
    """Find the head, set what is new in it to its start, and freeze everything else.

    Args:
        model: A network with a task head outside its base model.
        new: Parameters that the checkpoint did not bring.
        config: The run's configuration.

    Returns:
        Names of the modules that make up the head.

    Raises:
        ConfigError: The checkpoint does not cover the backbone.
    """
    head_modules = _head_modules(model, new, find_source(config))
    head = {name: value for name, value in model.named_parameters() if inside(name, head_modules)}
    for name in sorted(new & head.keys()):
        _start(name, head[name], config)
    _separate(model, head_modules)
    return head_modules


def frozen_arrays(model: nn.Module, head_modules: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers outside the head, by name."""
    persistent = model.state_dict().keys()
    arrays = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if k in persistent}}
    return {name: tensor for name, tensor in arrays.items() if not inside(name, head_modules)}


def _head_modules(model: Any, new: set[str], source: str) -> tuple[str, ...]:
    """Everything outside the base model, and a pooler inside it that the checkpoint does not bring."""
    children = [(name, child) for name, child in model.named_children() if any(True for _ in child.parameters())]
    # the vision tower of CLIP's classifier is a model, under a name that is not its prefix
    backbones = [name for name, child in children if isinstance(child, PreTrainedModel)] or [model.base_model_prefix]
    outside = [name for name, _ in children if name not in backbones]
    new_modules = {name.rpartition(".")[0] for name in new if not inside(name, outside)}
    strangers = sorted(name for name in new_modules if "pooler" not in name.split("."))
    if strangers:
        raise ConfigError(
            f"the weights of {source} do not cover the backbone",
            got=f"nothing that fits {len(strangers)} modules, the first being {strangers[0]}",
            cause="config.json and model.safetensors belong to different models",
            remedy="use the folder of one complete pretrained model",
            public="the model's weights do not fit its configuration",
        )
    return (*outside, *sorted(new_modules))


def _start(name: str, parameter: nn.Parameter, config: RunConfig) -> None:
    """Set a new head parameter to its start, the same at every site."""
    # the mean head is not zero either: no gradient would reach the backbone through it, and nothing could be sketched
    if name.endswith("bias"):
        value = np.zeros(parameter.shape, np.float32)
    elif parameter.dim() < 2:  # the gain of a normalisation
        value = np.ones(parameter.shape, np.float32)
    else:
        fan_in = math.prod(parameter.shape[1:])
        draw = exact.uniform(config.giva.seed, f"head:{name}", tuple(parameter.shape))
        value = draw * np.float32(1.0 / math.sqrt(fan_in))
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(value))


def _separate(model: nn.Module, head_modules: Sequence[str]) -> None:
    """Freeze the backbone; make the head trainable, float32, and let it take what a half-precision backbone gives."""
    model.requires_grad_(False)
    for name in head_modules:
        head = model.get_submodule(name).float().requires_grad_(True)
        head.register_forward_pre_hook(_float32_inputs)


def _float32_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)
