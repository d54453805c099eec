"""Small models adapted through PEFT, and what they compute; importing it skips a test file where PEFT is missing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from toy_modules import make_bases

from giva_core import inject
from giva_core.config import GivaConfig

peft = pytest.importorskip("peft", minversion="0.21")

from giva_core.peft import GivaLayer, GivaPeftConfig  # noqa: E402

SIZES = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
KINDS = {
    "mlp": (None, ("lin0", "lin1")),
    "bert": (transformers.BertConfig(**SIZES, intermediate_size=24), ("query", "intermediate.dense", "output.dense")),
    "gpt2": (transformers.GPT2Config(**SIZES, n_inner=24), ("c_attn", "c_fc", "mlp.c_proj")),
    "llama": (transformers.LlamaConfig(**SIZES, intermediate_size=24), ("q_proj", "down_proj")),
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 11)
        self.lin0, self.lin1, self.head = nn.Linear(11, 7), nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.lin1(torch.relu(self.lin0(self.embed(input_ids))))))


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(3)
    settings = KINDS[kind][0]
    made = Mlp() if settings is None else transformers.AutoModel.from_config(copy.deepcopy(settings))
    return made.to(dtype).eval()


def output(model, rows=4):
    tokens = torch.randint(1, 29, (rows, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=tokens)
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state


def bases_for(model, targets, seed=0, r=3):
    return make_bases(*inject.layer_shapes(model, GivaConfig(rank=r, target_modules=targets)), seed)


def perturb(model, adapter="default", seed=0):
    """Random vectors: an adapter that is not at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            for vectors in (layer.giva_lambda_o, layer.giva_lambda_s):
                if adapter in vectors:
                    vectors[adapter].copy_(torch.randn(vectors[adapter].shape, generator=generator))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GivaLayer)]


def adapted(kind, dtype=torch.float32, seed=0, **settings):
    """A model with one adapter away from its start, and the base model's output."""
    base = model_of(kind, dtype)
    before = output(base)
    config = GivaPeftConfig(bases=bases_for(base, KINDS[kind][1]), **settings)
    model = peft.get_peft_model(base, config).eval()
    perturb(model, seed=seed)
    return model, before


def loaded(kind, folder, **options):
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        return peft.PeftModel.from_pretrained(model_of(kind), str(folder), **options).eval()


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


def far(found, other):
    assert (found - other).abs().max() > 1e-2
