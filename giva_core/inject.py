"""Put the adapter into a model and read and write what is trained.

The order of work: `layer_shapes` (also on a meta-device model) → bases for these shapes → `inject` → training with
`read_vectors` / `write_vectors` between rounds → `merge` and `remove` for a plain model. Gangwar et al., "GiVA:
Gradient-Informed Bases for Vector-Based Adaptation", arXiv:2604.21901.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BasesError, ConfigError, NumericsError, ProtocolError, TargetError
from .layer import GivaLinear, check_bases, linear_shape
from .targets import find_targets as find_targets
from .targets import inside, listed, nearby, no_module, refuse_shared, walk
from .targets import layer_shapes as layer_shapes
from .types import Arrays, BasesSet

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
    modules = dict(walk(model))
    for name in (*bases.layers, *trainable):
        if name not in modules:
            raise no_module(name, modules)
    for name, layer in bases.layers.items():
        check_bases(linear_shape(modules[name], name), layer.A, layer.B)
        if inside(name, trainable):
            raise TargetError(f"'{name}' would be adapted and trained whole", remedy="leave it out of one of the two")
    refuse_shared(model, list(bases.layers))

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
            raise no_module(module, known)
    state = model.state_dict(keep_vars=True)
    return tuple(name for name, tensor in state.items() if tensor.is_floating_point() and inside(name, modules))


def read_state(model: nn.Module, names: Collection[str]) -> Arrays:
    """Copies of named parameters and floating buffers, float32.

    Raises:
        ProtocolError: The model has no such array.
    """
    tensors = _state(model)
    if unknown := [name for name in names if name not in tensors]:
        raise ProtocolError("the model has no such array", got=listed(unknown), expected=nearby(unknown[0], tensors))
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


def _refuse_merged(layers: Mapping[str, GivaLinear], what: str) -> None:
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise TargetError(f"{what} while layers are merged", got=listed(merged), remedy="call unmerge(model) first")


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
        raise ProtocolError(f"{what} are missing", got=f"none for {listed(missing)}", cause=cause)
    if unexpected := [name for name in arrays if name not in expected]:
        raise ProtocolError(f"unexpected {what}", got=listed(unexpected), cause=cause)
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
