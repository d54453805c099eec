"""Put the adapter into a model and read and write what is trained.

The order of work: `layer_shapes` (also on a meta-device model) → bases for these shapes → `inject` → training with
`read_vectors` / `write_vectors` between rounds → `merge` and `remove` for a plain model. Gangwar et al., "GiVA:
Gradient-Informed Bases for Vector-Based Adaptation", arXiv:2604.21901.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .config import ALL_LINEAR, GivaConfig
from .errors import BasesError, ConfigError, NumericsError, ProtocolError, TargetError
from .layer import GivaLinear, check_bases, is_adaptable, linear_shape, unwrap
from .types import Arrays, BasesSet, LayerShape

VECTORS = ("lambda_o", "lambda_s")


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapted model trains.

    Attributes:
        layers: Adapted layers.
        vector_parameters: Numbers in the vectors that are trained at present.
        other_parameters: Numbers trained besides them (head, modules to save).
        total_parameters: All numbers of the model, the vectors included.
    """

    layers: int
    vector_parameters: int
    other_parameters: int
    total_parameters: int

    @property
    def share(self) -> float:
        """Trained numbers divided by all numbers."""
        return (self.vector_parameters + self.other_parameters) / self.total_parameters


# -- targets ----------------------------------------------------------------------------------------------------------


def find_targets(
    model: nn.Module, target_modules: str | Collection[str], exclude: Collection[str] = ()
) -> tuple[tuple[str, nn.Module], ...]:
    """The linear layers to adapt, in model order.

    Args:
        model: A plain or adapted model, also on the meta device.
        target_modules: `all-linear`: every linear layer but output embeddings and `exclude`; another string: a regular
            expression for the whole name; a collection: names, or dotted endings of names.
        exclude: Modules that are trained whole (heads); they and what lies inside them are never adapted.

    Returns:
        `(name, module)` of each target; the module is a `GivaLinear` where the layer is adapted already.

    Raises:
        TargetError: Nothing matches, an ending matches nothing, a match is not a linear layer, or a target shares its
            module or weight with another place in the model.
    """
    modules = dict(_walk(model))
    open_names = [name for name in modules if not _inside(name, exclude)]
    if target_modules == ALL_LINEAR:
        outputs = _output_embeddings(model)
        names = [name for name in open_names if is_adaptable(modules[name]) and id(modules[name]) not in outputs]
        if not names:
            raise TargetError("the model has no linear layer to adapt", got=type(model).__name__)
    elif isinstance(target_modules, str):
        names = _match_expression(target_modules, open_names, modules)
    else:
        names = _match_endings(target_modules, open_names, modules)
    for name in names:
        linear_shape(modules[name], name)
    _refuse_shared(model, names)
    return tuple((name, modules[name]) for name in names)


def layer_shapes(
    model: nn.Module, config: GivaConfig, exclude: Collection[str] = ()
) -> tuple[tuple[LayerShape, ...], tuple[int, ...]]:
    """Shapes and effective ranks of the targets of `config`, in model order; see `find_targets`.

    A layer that is smaller than the rank gets what it can hold; a rank that no layer holds is a mistake.

    Raises:
        TargetError: Nothing to adapt, or the rank is above every layer's.
    """
    targets = find_targets(model, config.target_modules, exclude)
    layers = tuple(linear_shape(module, name) for name, module in targets)
    ranks = tuple(layer.effective_rank(config.rank, config.init) for layer in layers)
    largest = max((min(layer.d_out, layer.d_in) for layer in layers), default=config.rank)
    if largest < config.rank:
        raise TargetError(
            "the rank is above that of every layer",
            got=f"giva.rank = {config.rank}",
            expected=f"at most {largest}",
            remedy="lower giva.rank",
            public=f"giva.rank {config.rank} is above that of every layer, {largest}",
        )
    return layers, ranks


# -- wrapping ---------------------------------------------------------------------------------------------------------


def inject(
    model: nn.Module,
    bases: BasesSet,
    dropout: float = 0.0,
    trainable: Collection[str] = (),
    kind: type[GivaLinear] = GivaLinear,
) -> nn.Module:
    """Replace the layers named in `bases` by `GivaLinear`, in place, and freeze everything else.

    Args:
        model: The plain model.
        bases: Bases by layer name.
        dropout: Dropout on the adapters' input, while training.
        trainable: Modules trained whole besides the vectors (head, modules to save).
        kind: The adapted layer; a subclass trains something else between the same bases.

    Returns:
        `model`.

    Raises:
        TargetError: A layer or a trainable module is not there, cannot be adapted, or would be both; the model is
            adapted already. It is left as it was.
        BasesError: No bases, or bases that do not fit their layer. The model is left as it was.
    """
    if adapted_layers(model):
        raise TargetError("the model is adapted already", remedy="call remove(model) first")
    if not bases.layers:
        raise BasesError("there are no bases to adapt the model with", expected="bases of at least one layer")
    modules = dict(_walk(model))
    for name in (*bases.layers, *trainable):
        if name not in modules:
            raise _no_module(name, modules)
    for name, layer in bases.layers.items():
        check_bases(linear_shape(modules[name], name), layer.A, layer.B)
        if _inside(name, trainable):
            raise TargetError(f"'{name}' would be adapted and trained whole", remedy="leave it out of one of the two")
    _refuse_shared(model, list(bases.layers))

    model.requires_grad_(False)
    for name in trainable:
        modules[name].requires_grad_(True)
    for name, layer in bases.layers.items():
        _replace(model, name, kind(modules[name], layer.A, layer.B, dropout))
    return model


def remove(model: nn.Module) -> nn.Module:
    """Put the base layers back, in place; weights merged before stay merged, and frozen parameters stay frozen."""
    for name, layer in adapted_layers(model).items():
        _replace(model, name, layer.base_layer)
    return model


def adapted_layers(model: nn.Module) -> dict[str, GivaLinear]:
    """The adapted layers by name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GivaLinear)}


def merge(model: nn.Module) -> None:
    """Write every layer's ΔW into its base weight; see `GivaLinear.merge`."""
    for layer in adapted_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Put every base weight back, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what the base model does.

    Raises:
        TargetError: A layer is merged: its base weight is not the base model's.
    """
    layers = adapted_layers(model)
    _refuse_merged(layers, "the adapter cannot be disabled")
    before = {name: layer.enabled for name, layer in layers.items()}
    for layer in layers.values():
        layer.enabled = False
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.enabled = before[name]


def set_trainable(model: nn.Module, which: Collection[str]) -> None:
    """Train only some of the vectors, as mode `alternate` does.

    Args:
        model: An adapted model.
        which: Any of `lambda_o`, `lambda_s`; the others are frozen.

    Raises:
        ConfigError: Another name.
    """
    if unknown := set(which) - set(VECTORS):
        raise ConfigError("there is no such vector", got=", ".join(sorted(unknown)), expected=" or ".join(VECTORS))
    for layer in adapted_layers(model).values():
        for vector in VECTORS:
            getattr(layer, vector).requires_grad_(vector in which)


def summary(model: nn.Module) -> AdapterSummary:
    """Count what is trained."""
    layers = adapted_layers(model).values()
    vectors = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AdapterSummary(len(layers), vectors, trained - vectors, sum(p.numel() for p in model.parameters()))


# -- vectors and other trained arrays ---------------------------------------------------------------------------------


def read_vectors(model: nn.Module) -> Arrays:
    """Copies of `<layer>.lambda_o` and `<layer>.lambda_s` (or what else the layers train), float32."""
    return {name: _to_numpy(tensor) for name, tensor in _vectors(model).items()}


def write_vectors(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Set all vectors. Everything is checked before anything is written.

    Args:
        model: An adapted, unmerged model.
        arrays: Exactly the names and shapes of `read_vectors`.

    Raises:
        ProtocolError: A vector is missing, unexpected or of the wrong shape or type.
        NumericsError: A vector has entries that are not finite.
        TargetError: A layer is merged.
    """
    _refuse_merged(adapted_layers(model), "the vectors cannot be changed")
    tensors = _vectors(model)
    _write(tensors, _checked(arrays, {name: tuple(t.shape) for name, t in tensors.items()}, "vectors"))


def write_residual(model: nn.Module, residuals: Mapping[str, np.ndarray]) -> None:
    """Set the frozen residual coefficients R of `M = (lambda_o lambda_sᵀ + R) ∘ B`.

    Args:
        model: An adapted, unmerged model.
        residuals: R `(d_out, r)` by layer name, for every layer; empty takes all residuals away.

    Raises:
        ProtocolError, NumericsError, TargetError: As `write_vectors`.
    """
    layers = adapted_layers(model)
    _refuse_merged(layers, "the residual cannot be changed")
    expected = {name: tuple(layer.B.shape) for name, layer in layers.items()}
    values = _checked(residuals, expected, "residuals") if residuals else {}
    for name, layer in layers.items():
        layer.residual = torch.tensor(values[name], device=layer.B.device) if values else None


def module_state_names(model: nn.Module, modules: Collection[str]) -> tuple[str, ...]:
    """Names of the parameters and floating, persistent buffers inside `modules`, in model order.

    Raises:
        TargetError: The model has no such module.
    """
    known = dict(model.named_modules())
    for module in modules:
        if module not in known:
            raise _no_module(module, known)
    state = model.state_dict(keep_vars=True)
    return tuple(name for name, tensor in state.items() if tensor.is_floating_point() and _inside(name, modules))


def read_state(model: nn.Module, names: Collection[str]) -> Arrays:
    """Copies of named parameters and floating buffers, float32.

    Raises:
        ProtocolError: The model has no such array.
    """
    tensors = _state(model)
    if unknown := [name for name in names if name not in tensors]:
        raise ProtocolError("the model has no such array", got=_listed(unknown), expected=_nearby(unknown[0], tensors))
    return {name: _to_numpy(tensors[name]) for name in names}


def write_state(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Set named parameters and floating buffers. Everything is checked before anything is written.

    Raises:
        ProtocolError: The model has no such array, or one of another shape or type.
        NumericsError: An array has entries that are not finite.
    """
    tensors = _state(model)
    expected = {name: tuple(tensors[name].shape) for name in arrays if name in tensors}
    _write(tensors, _checked(arrays, expected, "arrays"))


# -- parts ------------------------------------------------------------------------------------------------------------


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All named modules under every name they have, without the root and the inside of adapters."""
    adapter: str | None = None
    for name, module in model.named_modules(remove_duplicate=False):
        if name and (adapter is None or not name.startswith(adapter)):
            adapter = f"{name}." if isinstance(module, GivaLinear) else None
            yield name, module


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _output_embeddings(model: nn.Module) -> set[int]:
    """Identities of the output embeddings of the model and of the models inside it."""
    getters = [getattr(module, "get_output_embeddings", None) for module in model.modules()]
    return {id(getter()) for getter in getters if getter is not None}


def _match_expression(expression: str, names: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise TargetError("giva.target-modules is not a regular expression", got=f"'{expression}' ({error})") from None
    matched = [name for name in names if pattern.fullmatch(name)]
    if not matched:
        raise TargetError(
            f"no module's whole name matches the regular expression '{expression}'",
            expected=_nearby(expression, modules),
            cause="a single string is an expression for the whole name",
            remedy="give endings as a list",
        )
    return matched


def _match_endings(endings: Collection[str], names: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    def matching(ending: str, among: Collection[str]) -> set[str]:
        return {name for name in among if f".{name}".endswith(f".{ending}")}

    matched: set[str] = set()
    for ending in endings:
        found = matching(ending, names) if ending else set()
        if not found and ending and matching(ending, modules):
            raise TargetError(f"target '{ending}' is inside a module that is trained whole", remedy="leave it out")
        if not found:
            raise TargetError(
                f"target '{ending}' matches no module",
                expected=_nearby(ending, modules),
                cause="a name of another architecture",
            )
        matched |= found
    if not matched:
        raise TargetError("giva.target-modules is empty", expected=_nearby("", modules))
    return [name for name in names if name in matched]


def _nearby(name: str, known: Mapping[str, object]) -> str:
    """Up to five known names (or endings of linear layers) that look like `name`."""
    linear = dict.fromkeys(
        key.rpartition(".")[2] for key, value in known.items() if isinstance(value, nn.Module) and is_adaptable(value)
    )
    close = difflib.get_close_matches(name, [*linear, *known], n=5, cutoff=0.6) or list(linear or known)[:5]
    return f"for example {', '.join(close)}" if close else "a model with such a module"


def _no_module(name: str, known: Mapping[str, object]) -> TargetError:
    cause = "bases or settings of another model"
    return TargetError(f"the model has no module '{name}'", expected=_nearby(name, known), cause=cause)


def _refuse_shared(model: nn.Module, names: list[str]) -> None:
    """A delta on one place of a shared weight would be merged into, or trained in, the other place as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        base = unwrap(modules[name])
        places = [owner.removesuffix(".weight").removesuffix(".base_layer") for owner in owners[id(base.weight)]]
        others = [place for place in places if place != name]
        if others:
            same = unwrap(modules[others[0]]) is base
            raise TargetError(
                f"target '{name}' is shared with {_listed(others)}",
                cause="one module under several names" if same else "tied weights, as of input and output embeddings",
                remedy="leave it out of giva.target-modules, or untie the weights",
            )


def _refuse_merged(layers: Mapping[str, GivaLinear], what: str) -> None:
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise TargetError(f"{what} while layers are merged", got=_listed(merged), remedy="call unmerge(model) first")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _vectors(model: nn.Module) -> dict[str, Tensor]:
    layers = adapted_layers(model)
    return {f"{name}.{vector}": getattr(layer, vector) for name, layer in layers.items() for vector in layer.vectors}


def _state(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()


def _checked(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], what: str) -> Arrays:
    """`arrays` as contiguous float32, or the first thing that is wrong with them."""
    cause = "arrays of another model or configuration"
    if missing := [name for name in expected if name not in arrays]:
        raise ProtocolError(f"{what} are missing", got=f"none for {_listed(missing)}", cause=cause)
    if unexpected := [name for name in arrays if name not in expected]:
        raise ProtocolError(f"unexpected {what}", got=_listed(unexpected), cause=cause)
    values: Arrays = {}
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise ProtocolError(f"'{name}' does not hold floating numbers", got=array.dtype, expected="float32")
        if array.shape != expected[name]:
            raise ProtocolError(f"'{name}' has the wrong shape", got=array.shape, expected=expected[name], cause=cause)
        with np.errstate(over="ignore"):
            values[name] = np.ascontiguousarray(array, dtype=np.float32).reshape(array.shape)
        if not np.isfinite(values[name]).all():
            raise NumericsError(
                f"'{name}' has entries that are not finite", cause="training diverged", remedy="lower the learning rate"
            )
    return values


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], values: Mapping[str, np.ndarray]) -> None:
    for name, value in values.items():
        tensors[name].copy_(torch.tensor(value))


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
