"""Calibration sketches by hooks: `Gᵀ M` and `G M` of a layer's weight gradient G, without ever forming G.

For a linear layer `G = Σ_t δ_t x_tᵀ`, with x_t the input and δ_t the gradient of the output at token t. So, with the
layer's inputs `X (tokens, d_in)` and output gradients `Δ (tokens, d_out)` stacked over all calls,

    side `output`:  Y = Gᵀ M = Xᵀ (Δ M)     M (d_out, q) → Y (d_in, q)
    side `input`:   Z = G M  = Δᵀ (X M)     M (d_in, q)  → Z (d_out, q)

The gradient is the one Gangwar et al. take their bases from (arXiv:2604.21901); to sketch it, so that a federation
can sum what its sites send, is ours. A sketch is linear: the mean of two sites' sketches, weighted by their examples,
is the sketch of their pooled gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BasesError, DataError, NumericsError, TargetError
from .layer import linear_shape, unwrap
from .types import Arrays, LayerShape

#: Model and batch → the SUM of the losses of the batch's examples, and how many examples these are.
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, int]]


@dataclass(frozen=True)
class SketchPass:
    """The sketches of one pass over the calibration batches.

    Attributes:
        arrays: float32 by layer name: `(d_in, q)` for side `output`, `(d_out, q)` for side `input`.
        num_examples: Examples behind them: the weight of this site.
        mean_loss: Mean loss over these examples.
        unreached: Layers no gradient came to; their sketches are zero.
    """

    arrays: Arrays
    num_examples: int
    mean_loss: float
    unreached: tuple[str, ...] = ()


def sketch_pass(
    model: nn.Module,
    layers: Sequence[LayerShape],
    multipliers: Mapping[str, np.ndarray | Tensor],
    side: str,
    batches: Iterable[Any],
    loss_fn: LossFunction,
) -> SketchPass:
    """Sketch the gradient of the mean loss over all examples of `batches`.

    The model runs in eval mode (no dropout) with no parameter asking for a gradient; both are put back afterwards.
    Layers may be called several times, in any floating type, plain or wrapped by an adapter, under non-reentrant
    checkpointing; products and sums are float32.

    Args:
        model: The model.
        layers: The layers to sketch.
        multipliers: M by layer name: `(d_out, q)` for side `output`, `(d_in, q)` for side `input`.
        side: The side of G the multiplier is on: its outputs (`Gᵀ M`) or its inputs (`G M`).
        batches: Calibration batches.
        loss_fn: Returns the sum of the losses of a batch, and its number of examples.

    Returns:
        The sketches, each divided by the number of examples.

    Raises:
        BasesError: A multiplier is missing, unexpected or of the wrong shape; there is no such side.
        TargetError: A layer is not in the model, or no gradient reaches any layer.
        DataError: There is no example.
        NumericsError: The loss or a sketch is not finite.
    """
    if side not in ("output", "input"):
        raise BasesError("a gradient has no such side", got=f"'{side}'", expected="output or input")
    taps = {layer.name: _make_tap(model, layer, side) for layer in layers}
    if taps.keys() != multipliers.keys():
        odd = min(taps.keys() ^ multipliers.keys())
        raise BasesError("layers and multipliers do not agree", got=f"'{odd}' in only one of them")
    for name, tap in taps.items():
        tap.prepare(multipliers[name])
    total_loss, num_examples = 0.0, 0
    with _calibrating(model), torch.enable_grad():
        handles = [tap.module.register_forward_hook(tap.hook, with_kwargs=True) for tap in taps.values()]
        try:
            for batch in batches:
                loss, count = loss_fn(model, batch)
                value = float(loss.detach())
                if not math.isfinite(value):
                    what = "the calibration loss is not finite"
                    raise NumericsError(what, cause="unusable inputs, or fp16 activations that overflow", public=what)
                if count < 1:
                    continue
                if not loss.requires_grad:
                    raise _disconnected()
                loss.backward()
                total_loss, num_examples = total_loss + value, num_examples + count
        finally:
            for handle in handles:
                handle.remove()
    if num_examples == 0:
        raise DataError("there is no calibration example", remedy="check the data", public="no calibration examples")
    unreached = tuple(name for name, tap in taps.items() if not tap.reached)
    if len(unreached) == len(taps):
        raise _disconnected()
    arrays = {name: tap.result(num_examples) for name, tap in taps.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NumericsError(
                f"the sketch of '{name}' is not finite",
                cause="the gradient overflows in the type of the activations",
                remedy="use bfloat16 or float32",
                public="a calibration sketch is not finite",
            )
    return SketchPass(arrays, num_examples, total_loss / num_examples, unreached)


class _Tap:
    """Collects the sketch of one layer."""

    def __init__(self, layer: LayerShape, module: nn.Module, side: str) -> None:
        self.layer, self.module, self.side, self.reached = layer, module, side, False

    def prepare(self, multiplier: np.ndarray | Tensor) -> None:
        """Take the multiplier and start the sum at zero."""
        shape = self.layer
        d_multiplier, d_result = (shape.d_out, shape.d_in) if self.side == "output" else (shape.d_in, shape.d_out)
        if multiplier.ndim != 2 or multiplier.shape[0] != d_multiplier:
            raise BasesError(
                f"the multiplier of '{shape.name}' does not fit side {self.side}",
                got=tuple(multiplier.shape),
                expected=f"({d_multiplier}, q)",
            )
        device = next(self.module.parameters()).device
        if isinstance(multiplier, np.ndarray):
            multiplier = torch.tensor(multiplier)
        self.multiplier = multiplier.detach().to(device, torch.float32)
        self.total = torch.zeros(d_result, multiplier.shape[1], device=device)

    def hook(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """Forward hook: put a `_Probe` behind the layer; not in the first, gradient-free forward of checkpointing."""
        if not torch.is_grad_enabled():
            return None
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        kept = x if self.side == "output" else _product(x.reshape(-1, self.layer.d_in), self.multiplier)
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        return _Probe.apply(output, anchor, kept, self)

    def add(self, kept: Tensor, grad: Tensor) -> None:
        """Add one call's share; `kept` is X for side `output` and X M for side `input`."""
        delta = grad.reshape(-1, self.layer.d_out)
        if self.side == "output":
            self.total += _product(kept.reshape(-1, self.layer.d_in).T, _product(delta, self.multiplier))
        else:
            self.total += _product(delta.T, kept)
        self.reached = True

    def result(self, num_examples: int) -> np.ndarray:
        """The sketch of the mean loss's gradient."""
        return (self.total / num_examples).cpu().numpy()


class _Probe(torch.autograd.Function):
    """The identity, which shows the gradient of a layer's output to its tap.

    `anchor` asks for a gradient, so the probe is on the graph even where everything upstream is frozen. The input is
    kept by `save_for_backward`, not in a closure, so that checkpointing can drop and recompute it. The output is the
    same memory as another tensor, which models may work on in place: a linear layer keeps no output of its own, and
    the version that both share tells on whoever does.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, kept: Tensor, tap: _Tap) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.tap = tap
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        ctx.tap.add(*ctx.saved_tensors, grad)
        return (grad if ctx.needs_input_grad[0] else None), None, None, None


def _make_tap(model: nn.Module, layer: LayerShape, side: str) -> _Tap:
    try:
        module = unwrap(model.get_submodule(layer.name))
    except AttributeError:
        raise TargetError(f"the model has no layer '{layer.name}'", cause="a configuration of another model") from None
    found = linear_shape(module, layer.name)
    if found != layer:
        raise TargetError(
            f"'{layer.name}' has another shape",
            got=f"({found.d_out}, {found.d_in})",
            expected=f"({layer.d_out}, {layer.d_in})",
            cause="a configuration of another model",
        )
    return _Tap(layer, module, side)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A float32 product, whatever autocast says."""
    with torch.autocast(left.device.type, enabled=False):
        return left.float() @ right.float()


@contextmanager
def _calibrating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no parameter asks for a gradient; afterwards every module and parameter is as it was."""
    training = [(module, module.training) for module in model.modules()]
    asking = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, flag in asking:
            parameter.requires_grad_(flag)


def _disconnected() -> TargetError:
    return TargetError(
        "no gradient reaches any of the layers",
        cause="the loss does not depend on them, or reentrant checkpointing cuts the graph behind frozen layers",
        remedy="use checkpointing with use_reentrant=False",
    )
