"""Sketches by hooks against dense gradients, and what a pass must leave as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from giva_core.config import GivaConfig
from giva_core.errors import BasesError, DataError, NumericsError, TargetError
from giva_core.inject import inject, layer_shapes, read_vectors, write_vectors
from giva_core.sketch import SketchPass, sketch_pass
from giva_core.types import Bases, BasesSet, LayerShape

D_IN, HIDDEN, LABELS, VOCAB, Q = 6, 10, 4, 13, 3
SIDES = ("output", "input")


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Toy(nn.Module):
    """A frozen embedding, a layer used twice, in-place work on an output, a Conv1D, dropout and a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D_IN)
        self.first = nn.Linear(D_IN, HIDDEN)
        self.twice = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.conv = Conv1D(D_IN, HIDDEN)
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Linear(D_IN, LABELS)
        self.pooled = nn.Linear(D_IN, LABELS)
        self.checkpointing: bool | None = None

    def body(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x += 1.0
        x *= 0.5
        x = torch.tanh(self.twice(torch.tanh(self.twice(input=x))))
        return self.conv(self.dropout(x))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.body(x) if self.checkpointing is None else checkpoint(self.body, x, use_reentrant=self.checkpointing)
        return self.pooled(x.mean(1))  # a 2-D input


SHAPES = (
    LayerShape("first", HIDDEN, D_IN), LayerShape("twice", HIDDEN, HIDDEN), LayerShape("conv", D_IN, HIDDEN),
    LayerShape("pooled", LABELS, D_IN),
)  # fmt: skip

Batch = tuple[Tensor, Tensor]


def make_toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def make_batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randint(VOCAB, (n, 7), generator=generator), torch.randint(LABELS, (n,), generator=generator))
        for n in sizes
    ]


def sum_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="sum"), len(batch[1])


def multipliers(layers: tuple[LayerShape, ...], side: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {x.name: rng.normal(size=(x.d_out if side == "output" else x.d_in, Q)).astype(np.float32) for x in layers}


def run(
    model: nn.Module,
    batches: list[Any],
    side: str,
    layers: tuple[LayerShape, ...] = SHAPES,
    loss_fn: Callable[..., Any] = sum_loss,
) -> SketchPass:
    return sketch_pass(model, layers, multipliers(layers, side), side, batches, loss_fn)


def dense_gradients(
    model: nn.Module,
    batches: list[Any],
    layers: tuple[LayerShape, ...] = SHAPES,
    loss_fn: Callable[..., Any] = sum_loss,
) -> dict[str, Tensor]:
    """G `(d_out, d_in)` of the mean loss, by autograd on the weights."""
    model = model.eval().requires_grad_(True)
    results = [loss_fn(model, batch) for batch in batches]
    (sum(loss for loss, _ in results) / sum(count for _, count in results)).backward()
    grads = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        grads[layer.name] = module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad
    model.zero_grad()
    return grads


def assert_sketches(
    found: SketchPass, grads: dict[str, Tensor], side: str, tolerance: float, layers: tuple[LayerShape, ...] = SHAPES
) -> None:
    for name, M in multipliers(layers, side).items():
        G = grads[name].double().numpy()
        expected = (G.T if side == "output" else G) @ M
        assert found.arrays[name].dtype == np.float32
        assert found.arrays[name].shape == expected.shape
        assert np.linalg.norm(found.arrays[name] - expected) <= tolerance * np.linalg.norm(expected), name


@pytest.mark.parametrize("side", SIDES)
def test_sketch_is_that_of_the_dense_gradient_of_the_mean_loss(side: str) -> None:
    model, batches = make_toy(), make_batches(5, 2)
    found = run(model, batches, side)
    assert found.num_examples == 7
    assert found.unreached == ()
    with torch.no_grad():
        expected = sum(float(sum_loss(model.eval(), batch)[0]) for batch in batches) / 7
    assert found.mean_loss == pytest.approx(expected, rel=1e-6)
    assert_sketches(found, dense_gradients(model, batches), side, 1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_tensors_serve_as_multipliers_too(side: str) -> None:
    model, batches = make_toy(), make_batches(5)
    tensors = {name: torch.tensor(M) for name, M in multipliers(SHAPES, side).items()}
    found = sketch_pass(model, SHAPES, tensors, side, batches, sum_loss)
    expected = run(model, batches, side)
    assert all(np.array_equal(found.arrays[name], expected.arrays[name]) for name in tensors)


@pytest.mark.parametrize("side", SIDES)
def test_weighted_mean_of_two_sites_is_the_sketch_of_the_pooled_gradient(side: str) -> None:
    model, batches = make_toy(), make_batches(5, 2, 4)
    pooled = run(model, batches, side)
    sites = [run(model, batches[:1], side), run(model, batches[1:], side)]
    for name, array in pooled.arrays.items():
        mean = sum(np.float32(site.num_examples / 11) * site.arrays[name] for site in sites)
        assert np.linalg.norm(mean - array) <= 1e-6 * np.linalg.norm(array), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_checkpointing_changes_nothing(side: str, use_reentrant: bool) -> None:
    model, batches = make_toy(), make_batches(5)
    grads = dense_gradients(model, batches)
    model.checkpointing = use_reentrant
    if use_reentrant:  # cuts the graph behind frozen layers unless its input asks for a gradient
        model.embed.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    assert_sketches(run(model, batches, side), grads, side, 1e-5)


def test_reentrant_checkpointing_that_cuts_the_graph_is_reported() -> None:
    model = make_toy()
    model.checkpointing = True
    with pytest.warns(UserWarning, match="None of the inputs"):
        found = run(model, make_batches(5), "output")
    assert found.unreached == ("first", "twice", "conv")
    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(TargetError, match="use_reentrant"):
        run(model, make_batches(5), "output", SHAPES[:3])


@pytest.mark.parametrize("checkpointing", [None, False])
def test_checkpointing_lets_go_of_the_inputs(checkpointing: bool | None) -> None:
    model = make_toy()
    model.checkpointing = checkpointing
    inputs: list[StorageWeakRef] = []
    handle = model.conv.register_forward_hook(
        lambda _module, args, _output: inputs.append(StorageWeakRef(args[0].untyped_storage()))
    )
    let_go: list[bool] = []

    def loss_fn(net: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        loss, count = sum_loss(net, batch)
        let_go.append(inputs[0].expired())
        return loss, count

    run(model, make_batches(5), "output", loss_fn=loss_fn)
    handle.remove()
    assert let_go == [checkpointing is False], "after the forward pass the input is kept, or is recomputed later"


@pytest.mark.parametrize("side", SIDES)
def test_low_precision_activations_are_multiplied_in_float32(side: str) -> None:
    model, batches = make_toy(), make_batches(5, 2)
    grads = dense_gradients(model, batches)
    model.to(torch.bfloat16)
    assert_sketches(run(model, batches, side), grads, side, 0.05)


@pytest.mark.parametrize("side", SIDES)
def test_backward_inside_autocast_is_right(side: str) -> None:
    model, batches = make_toy(), make_batches(5, 2)
    grads = dense_gradients(model, batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(model, batches, side)
    assert_sketches(found, grads, side, 0.05)


@pytest.mark.parametrize("side", SIDES)
def test_products_are_float32_whatever_autocast_says(side: str) -> None:
    model, batches, last = make_toy(), make_batches(5), SHAPES[-1:]
    grads = dense_gradients(model, batches)

    def loss_fn(net: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        with torch.autocast("cpu", enabled=False):
            return sum_loss(net, batch)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(model, batches, side, last, loss_fn)
    assert_sketches(found, grads, side, 1e-5, last)


@pytest.mark.parametrize("side", SIDES)
def test_adapted_model_gives_the_gradient_at_the_adapted_weights(side: str) -> None:
    rng = np.random.default_rng(3)
    layers, batches = SHAPES[:3], make_batches(5)
    made = {x.name: [rng.normal(size=s).astype(np.float32) for s in ((2, x.d_in), (x.d_out, 2))] for x in layers}
    bases = BasesSet({name: Bases(A, B) for name, (A, B) in made.items()}, "rand", "")
    plain, model = make_toy(), inject(make_toy(), bases)
    assert_sketches(run(model, batches, side), dense_gradients(plain, batches), side, 1e-5)

    vectors = {n: rng.normal(scale=0.3, size=a.shape).astype(np.float32) for n, a in read_vectors(model).items()}
    write_vectors(model, vectors)
    with torch.no_grad():
        for layer in layers:
            plain.get_submodule(layer.name).weight += model.get_submodule(layer.name).delta_weight()
    assert_sketches(run(model, batches, side), dense_gradients(plain, batches), side, 1e-5)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: p.grad is None for name, p in model.named_parameters()},
        {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = make_toy().train()
    model.first.eval()
    model.embed.requires_grad_(False)
    before = snapshot(model)

    def loss_fn(net: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        assert not any(module.training for module in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        if fails and len(batch[1]) == 2:
            raise KeyError
        return sum_loss(net, batch)

    if fails:
        with pytest.raises(KeyError):
            run(model, make_batches(5, 2), "output", loss_fn=loss_fn)
    else:
        with torch.no_grad():
            run(model, make_batches(5, 2), "output", loss_fn=loss_fn)
    assert snapshot(model) == before


class Allocations(TorchDispatchMode):
    """Collects the shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.shapes |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("side", SIDES)
def test_no_tensor_of_the_shape_of_a_weight_is_computed(side: str) -> None:
    model, batches = make_toy(), make_batches(5)
    weights = {s for layer in SHAPES for s in ((layer.d_out, layer.d_in), (layer.d_in, layer.d_out))}
    with Allocations() as seen:
        dense_gradients(model, batches)
    assert seen.shapes & weights, "the watch sees dense gradients"
    with Allocations() as seen:
        run(model, batches, side)
    assert not seen.shapes & weights
    assert (VOCAB, D_IN) not in seen.shapes, "the embedding gets no gradient"
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("side", SIDES)
def test_padding_changes_nothing_on_bert(side: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=20, num_labels=LABELS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    layers, _ = layer_shapes(model, GivaConfig(), exclude=["classifier"])
    assert len(layers) == 2 * 6 + 1, "six linear layers a block, and the pooler"
    generator = torch.Generator().manual_seed(2)
    ids, labels = torch.randint(1, VOCAB, (3, 6), generator=generator), torch.tensor([0, 3, 1])
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0

    def loss_fn(net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        logits = net(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels)

    plain = [{"ids": ids, "mask": mask}]
    padded = [{"ids": F.pad(ids, (0, 5)), "mask": F.pad(mask, (0, 5))}]
    found, wider = (run(model, batch, side, layers, loss_fn) for batch in (plain, padded))
    for name, array in found.arrays.items():
        assert np.linalg.norm(wider.arrays[name] - array) <= 1e-5 * np.linalg.norm(array), name
    assert_sketches(found, dense_gradients(model, plain, layers, loss_fn), side, 1e-5, layers)


@pytest.mark.parametrize("side", SIDES)
def test_a_layer_that_takes_no_part_is_zero_and_reported(side: str) -> None:
    layers = (*SHAPES, LayerShape("unused", LABELS, D_IN))
    found = run(make_toy(), make_batches(5), side, layers)
    assert found.unreached == ("unused",)
    assert not found.arrays["unused"].any()


def test_batches_without_examples_do_not_count() -> None:
    model, batches = make_toy(), make_batches(5, 0)
    found, expected = run(model, batches, "output"), run(model, batches[:1], "output")
    assert found.num_examples == 5
    assert all(np.array_equal(found.arrays[name], expected.arrays[name]) for name in expected.arrays)
    for nothing in ([], batches[1:]):
        with pytest.raises(DataError, match="no calibration example"):
            run(model, nothing, "output")


def test_results_that_are_not_finite_are_refused_by_name() -> None:
    def huge(net: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        loss, count = sum_loss(net, batch)
        loss.register_hook(lambda grad: grad * float("inf"))
        return loss, count

    def undefined(net: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return sum_loss(net, batch)[0] * float("nan"), len(batch[1])

    with pytest.raises(NumericsError, match="sketch of 'first'"):
        run(make_toy(), make_batches(5), "output", loss_fn=huge)
    with pytest.raises(NumericsError, match="loss is not finite"):
        run(make_toy(), make_batches(5), "output", loss_fn=undefined)


def test_bad_input_is_refused() -> None:
    model, batches = make_toy(), make_batches(5)
    M = multipliers(SHAPES, "output")
    with pytest.raises(BasesError, match="no such side"):
        sketch_pass(model, SHAPES, M, "both", batches, sum_loss)
    with pytest.raises(BasesError, match="'conv' in only one"):
        sketch_pass(model, SHAPES, {n: value for n, value in M.items() if n != "conv"}, "output", batches, sum_loss)
    with pytest.raises(BasesError, match=r"'first'.*side input"):
        sketch_pass(model, SHAPES, M, "input", batches, sum_loss)
    for layer, error in (
        (LayerShape("gone", 3, 2), "'gone'"),
        (LayerShape("first", 3, 2), "'first' has another shape"),
    ):
        with pytest.raises(TargetError, match=error):
            run(model, batches, "output", (layer,))
    with pytest.raises(TargetError, match="no gradient reaches"):
        run(model, batches, "output", loss_fn=lambda net, batch: (torch.ones(()), 5))
