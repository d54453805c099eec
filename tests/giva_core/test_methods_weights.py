"""Methods that start from the weight's singular vectors, and what the frozen parts of methods come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from giva_core import factored, inject, methods
from giva_core.config import RunConfig
from giva_core.errors import BasesError, ConfigError
from giva_core.methods import lora
from giva_core.methods.weight_bases import weight_bases
from giva_core.protocol import arrays_digest
from giva_core.types import LayerShape


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(11, 17), nn.Tanh(), nn.Linear(17, 13))
        self.head = nn.Linear(13, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def prepared(method: str, **settings: object) -> tuple[Net, methods.Prepared]:
    if method not in ("osora", "lora-xs", "full", "head", "giva"):
        pytest.importorskip("peft")
    flat = {"method": method, "giva.rank": 3, "vera.rank": 5, "lora.rank": 2, **settings}
    flat = {"randlora.rank": 4, "randlora.alpha": 4.0, **flat}
    net = Net().requires_grad_(False)
    return net, methods.prepare(net, RunConfig.from_flat(flat), ["head"])


def test_bases_are_the_singular_triplets_of_the_weight() -> None:
    rng = np.random.default_rng(0)
    layers = (LayerShape("a", 40, 25), LayerShape("b", 9, 30))
    weights = {s.name: rng.normal(size=(s.d_out, s.d_in)).astype(np.float32) for s in layers}
    made, values = weight_bases(layers, (4, 3), weights, seed=0)
    for layer, r in zip(layers, (4, 3), strict=True):
        U, S, Vh = np.linalg.svd(weights[layer.name].astype(np.float64), full_matrices=False)
        pair = made.layers[layer.name]
        np.testing.assert_allclose(values[layer.name], S[:r], rtol=1e-4)
        np.testing.assert_allclose(pair.B * values[layer.name] @ pair.A, U[:, :r] * S[:r] @ Vh[:r], atol=2e-3)
        np.testing.assert_allclose(pair.A @ pair.A.T, np.eye(r), atol=1e-6)
    again, _ = weight_bases(layers, (4, 3), weights, seed=0)
    assert again.digest == made.digest


def test_a_weight_of_too_low_a_rank_is_refused() -> None:
    flat = np.outer(np.arange(1.0, 8.0), np.arange(1.0, 12.0)).astype(np.float32)
    with pytest.raises(BasesError, match="too low a rank"):
        weight_bases((LayerShape("a", 7, 11),), (2,), {"a": flat}, seed=0)


@pytest.mark.parametrize(
    "method", ["lora", "ffa-lora", "rolora", "fedex-lora", "vera", "randlora", "osora", "lora-xs", "full", "head"]
)
def test_nothing_changes_at_the_start_and_every_trained_array_gets_a_gradient_in_time(method: str) -> None:
    net, found = prepared(method)
    x = torch.randn(5, 11)
    torch.testing.assert_close(net(x), Net()(x), rtol=0, atol=1e-6)
    parameters = dict(net.named_parameters())
    for name in found.trained:
        parameters[name].requires_grad_(True)
    for _ in range(3):
        for name in found.trained:
            parameters[name].grad = None
        if not found.trained:
            return
        net(x).square().sum().backward()
        with torch.no_grad():
            for name in found.trained:
                parameters[name].sub_(parameters[name].grad, alpha=0.1)
    assert all(parameters[name].grad.abs().max() > 0 for name in found.trained)
    assert not torch.allclose(net(x), Net()(x), atol=1e-4)


def test_osora_is_the_weight_with_its_leading_part_scaled() -> None:
    net, _ = prepared("osora")
    U, S, Vh = np.linalg.svd(Net().body[0].weight.detach().numpy().astype(np.float64), full_matrices=False)
    o, s = np.linspace(0.5, 2.0, 17), np.array([3.0, 2.0, 1.0])
    arrays = inject.read_vectors(net)
    arrays.update({"body.0.lambda_o": o.astype(np.float32), "body.0.lambda_s": s.astype(np.float32)})
    inject.write_vectors(net, arrays)
    changed = o[:, None] * (U[:, :3] * s) @ Vh[:3] - (U[:, :3] * S[:3]) @ Vh[:3]
    np.testing.assert_allclose(net.body[0].delta_weight().numpy(), changed, atol=1e-3)


def test_what_a_method_freezes_depends_on_seed_and_weights_alone() -> None:
    for method in ("ffa-lora", "vera", "randlora", "osora", "lora-xs"):
        torch.manual_seed(0)
        digest = arrays_digest(prepared(method)[1].frozen)
        torch.manual_seed(99)
        assert arrays_digest(prepared(method)[1].frozen) == digest
        if method not in ("osora", "lora-xs"):
            assert arrays_digest(prepared(method, **{"giva.seed": 7})[1].frozen) != digest
    assert prepared("lora")[1].frozen == {}


def test_random_matrices_have_peft_s_spread() -> None:
    vera, rand = prepared("vera")[1].frozen, prepared("randlora", **{"randlora.rank": 1})[1].frozen
    assert vera["vera_A"].shape == (5, 17) and vera["vera_B"].shape == (17, 5)
    assert 0.7 < np.abs(vera["vera_A"]).max() / np.sqrt(6 / 17) <= 1.0
    assert 0.85 < rand["randlora_B"].std() < 1.15


def test_full_trains_every_array_outside_the_head_once() -> None:
    _, found = prepared("full")
    assert found.trained == ("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "fedex-lora", "strategy.name": "fedadam"}, "fedex-lora keeps the exact mean"),
        ({"method": "full", "model.dtype": "bfloat16"}, "trains the weights themselves"),
        ({"method": "full", "giva.dropout": 0.1}, "no adapter to drop inputs of"),
        ({"method": "vera", "rounds.mode": "exact"}, "averages GiVA's vectors"),
        ({"method": "fedsa-lora"}, "not a known choice"),
        ({"method": "lora-xs", "lora_xs.bases": "random"}, "not a known choice"),
        ({"vera.alpha": 1.0}, "there is no setting"),
    ],
)
def test_settings_that_do_not_fit_a_method_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RunConfig.from_flat(settings)


def test_a_residual_is_added_as_it_lies_where_a_square_layer_holds_its_weight_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.base_layer = Conv1D(4, 4)

    net, residual = Square(), np.arange(16, dtype=np.float32).reshape(4, 4)
    before = net.inner.base_layer.weight.detach().clone()
    lora.add_residual(net, {f"inner.{factored.DENSE}": residual}, {})
    torch.testing.assert_close(net.inner.base_layer.weight.detach(), before + torch.from_numpy(residual).T)
