"""The LoRA baseline: PEFT's layers where they belong, started from the seed alone."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from giva_core.config import RunConfig
from giva_core.errors import DependencyError
from giva_core.methods.lora import put_in
from giva_core.types import LayerShape

LAYERS = (LayerShape("body.0", 7, 11), LayerShape("body.2", 5, 7))
NAMES = {
    "body.0.lora_A.default.weight": (3, 11),
    "body.0.lora_B.default.weight": (7, 3),
    "body.2.lora_A.default.weight": (3, 7),
    "body.2.lora_B.default.weight": (5, 3),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 5))
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def made(seed: int = 0, torch_seed: int = 0) -> tuple[Net, Net, tuple[str, ...]]:
    """The plain model, the same with LoRA, and the names that are trained."""
    pytest.importorskip("peft")
    torch.manual_seed(1)
    plain = Net().requires_grad_(False)
    adapted = Net()
    adapted.load_state_dict(plain.state_dict())
    config = RunConfig.from_flat({"method": "lora", "lora.rank": 3, "lora.alpha": 12.0, "giva.seed": seed})
    torch.manual_seed(torch_seed)
    return plain, adapted, put_in(adapted.requires_grad_(False), LAYERS, (3, 3), config)[0]


def test_names_are_the_matrices_of_the_target_layers_alone() -> None:
    _, adapted, names = made()
    parameters = dict(adapted.named_parameters())
    assert {name: tuple(parameters[name].shape) for name in names} == NAMES
    assert all(parameters[name].requires_grad for name in names)
    assert isinstance(adapted.head, nn.Linear) and not adapted.body[0].base_layer.weight.requires_grad


def test_nothing_changes_at_the_start() -> None:
    plain, adapted, _ = made()
    x = torch.randn(4, 11)
    torch.testing.assert_close(adapted(x), plain(x), rtol=0, atol=0)


def test_delta_is_alpha_over_r_times_b_a() -> None:
    plain, adapted, _ = made()
    layer = adapted.body[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    delta = 12.0 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(4, 11)
    torch.testing.assert_close(layer(x), x @ (plain.body[0].weight + delta).T + plain.body[0].bias)


def test_start_depends_on_the_run_s_seed_alone() -> None:
    def start(seed: int, torch_seed: int) -> torch.Tensor:
        _, adapted, names = made(seed, torch_seed)
        parameters = dict(adapted.named_parameters())
        return torch.cat([parameters[name].detach().ravel() for name in names])

    assert torch.equal(start(0, 0), start(0, 99))
    assert not torch.equal(start(0, 0), start(1, 0))


def test_start_has_peft_s_distribution() -> None:
    _, adapted, _ = made()
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.5 * bound < parameter.detach().abs().max() <= bound
            assert abs(float(parameter.detach().mean())) < 0.3 * bound
        elif ".lora_B." in name:
            assert not parameter.any()


def test_peft_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match="needs PEFT") as caught:
        put_in(Net(), LAYERS, (3, 3), RunConfig(method="lora"))
    assert caught.value.public == "PEFT not installed"
