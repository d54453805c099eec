"""Which layers are adapted: names, expressions, what is left out and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_modules import BACKBONE, HIDDEN, INNER, LABELS, Toy, make_bases

from giva_core.config import GivaConfig
from giva_core.errors import TargetError
from giva_core.inject import inject
from giva_core.targets import find_targets, layer_shapes
from giva_core.types import LayerShape


def names(found: tuple[tuple[str, nn.Module], ...]) -> tuple[str, ...]:
    return tuple(name for name, _ in found)


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_out_heads_and_output_embeddings(tied: bool) -> None:
    assert names(find_targets(Toy(tied), "all-linear", exclude=["head"])) == BACKBONE


def test_output_embeddings_of_an_inner_model_are_left_out_too() -> None:
    wrapper = nn.ModuleDict({"backbone": Toy(), "classifier": nn.Linear(HIDDEN, LABELS)})
    found = names(find_targets(wrapper, "all-linear", exclude=["classifier", "backbone.head"]))
    assert found == tuple(f"backbone.{name}" for name in BACKBONE)


def test_endings_match_whole_dotted_parts_in_model_order() -> None:
    assert names(find_targets(Toy(), ("down", "0.up"))) == ("blocks.0.up", "blocks.0.down", "blocks.1.down")
    assert names(find_targets(Toy(), ["blocks.1.up"])) == ("blocks.1.up",)
    with pytest.raises(TargetError, match="'p' matches no module"):
        find_targets(Toy(), ("p",))


def test_expression_matches_the_whole_name() -> None:
    assert names(find_targets(Toy(), r"blocks\.\d\.up")) == ("blocks.0.up", "blocks.1.up")
    with pytest.raises(TargetError, match=r"'up'.*endings as a list"):
        find_targets(Toy(), "up")
    with pytest.raises(TargetError, match="not a regular expression"):
        find_targets(Toy(), "(")


def test_untied_output_embedding_may_be_named() -> None:
    assert names(find_targets(Toy(), ("lm_head",))) == ("lm_head",)


@pytest.mark.parametrize("ending", ["upp", "blocks.2.up", ""])
def test_an_ending_that_matches_nothing_is_refused_with_near_names(ending: str) -> None:
    with pytest.raises(TargetError, match=rf"'{ending}' matches no module.*\bup\b"):
        find_targets(Toy(), ("down", ending))


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(TargetError, match="empty"):
        find_targets(Toy(), ())
    with pytest.raises(TargetError, match="no linear layer"):
        find_targets(nn.Sequential(nn.LayerNorm(3)), "all-linear")


def test_a_target_inside_a_head_is_refused() -> None:
    with pytest.raises(TargetError, match="trained whole"):
        find_targets(Toy(), ("head.0",), exclude=["head"])


@pytest.mark.parametrize(("target", "kind"), [("norm", "LayerNorm"), ("embed", "Embedding"), ("blocks", "ModuleList")])
def test_other_kinds_of_modules_are_refused_by_name_and_type(target: str, kind: str) -> None:
    with pytest.raises(TargetError, match=rf"{target}.*{kind}"):
        find_targets(Toy(), (target,))


def test_convolutions_are_refused_when_named() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(3, 4, 1), "linear": nn.Linear(3, 4)})
    assert names(find_targets(model, "all-linear")) == ("linear",)
    with pytest.raises(TargetError, match=r"'conv'.*Conv1d"):
        find_targets(model, r".*")


def test_weight_tied_to_an_embedding_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'lm_head' is shared with 'embed'.*tied weights"):
        find_targets(Toy(tied=True), ("lm_head",))


def test_two_targets_with_one_weight_are_refused() -> None:
    model = Toy()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    with pytest.raises(TargetError, match=r"'blocks.0.up' is shared with 'blocks.1.up'.*tied weights"):
        find_targets(model, "all-linear", exclude=["head"])


def test_one_module_under_two_names_is_refused() -> None:
    model = Toy()
    model.alias = model.blocks[0].up
    with pytest.raises(TargetError, match=r"shared with 'alias'.*several names"):
        find_targets(model, ("blocks.0.up",))


def test_layer_shapes_on_meta_on_cpu_and_after_injection_agree() -> None:
    config = GivaConfig(rank=6)
    with torch.device("meta"):
        meta = Toy()
    layers, ranks = layer_shapes(meta, config, exclude=["head"])
    assert layers[:2] == (LayerShape("blocks.0.up", INNER, HIDDEN), LayerShape("blocks.0.down", HIDDEN, INNER))
    assert ranks == (6, 6, 6, 6)
    adapted = inject(Toy(), make_bases(layers, ranks), trainable=["head"])
    assert layer_shapes(adapted, config, exclude=["head"]) == (layers, ranks)
    assert layer_shapes(meta, GivaConfig(rank=6, init="secsv"), exclude=["head"])[1] == (3, 3, 3, 3)


def test_a_rank_is_clipped_where_a_layer_is_smaller_and_refused_where_all_are() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Linear(9, 12))
    assert layer_shapes(model, GivaConfig(rank=7))[1] == (5, 7)
    with pytest.raises(TargetError, match=r"got giva.rank = 10; expected at most 9. Remedy: lower giva.rank"):
        layer_shapes(model, GivaConfig(rank=10))
