"""Which layers of a model are adapted: all linear ones, or those that names or an expression choose."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from .config import ALL_LINEAR, GivaConfig
from .errors import TargetError
from .layer import GivaLinear, is_adaptable, linear_shape, unwrap
from .types import LayerShape


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
    modules = dict(walk(model))
    open_names = [name for name in modules if not inside(name, exclude)]
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
    refuse_shared(model, names)
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
            expected=nearby(expression, modules),
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
                expected=nearby(ending, modules),
                cause="a name of another architecture",
            )
        matched |= found
    if not matched:
        raise TargetError("giva.target-modules is empty", expected=nearby("", modules))
    return [name for name in names if name in matched]


# -- names ------------------------------------------------------------------------------------------------------------


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All named modules under every name they have, without the root and the inside of adapters."""
    adapter: str | None = None
    for name, module in model.named_modules(remove_duplicate=False):
        if name and (adapter is None or not name.startswith(adapter)):
            adapter = f"{name}." if isinstance(module, GivaLinear) else None
            yield name, module


def inside(name: str, modules: Collection[str]) -> bool:
    """Whether a module or parameter of this name is one of `modules`, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def nearby(name: str, known: Mapping[str, object]) -> str:
    """Up to five known names (or endings of linear layers) that look like `name`."""
    linear = dict.fromkeys(
        key.rpartition(".")[2] for key, value in known.items() if isinstance(value, nn.Module) and is_adaptable(value)
    )
    close = difflib.get_close_matches(name, [*linear, *known], n=5, cutoff=0.6) or list(linear or known)[:5]
    return f"for example {', '.join(close)}" if close else "a model with such a module"


def no_module(name: str, known: Mapping[str, object]) -> TargetError:
    """The error for a module that is not there."""
    cause = "bases or settings of another model"
    return TargetError(f"the model has no module '{name}'", expected=nearby(name, known), cause=cause)


def refuse_shared(model: nn.Module, names: list[str]) -> None:
    """Refuse targets that share their module or weight with another place in the model.

    A delta on one place would be merged into, or trained in, the other place as well.

    Raises:
        TargetError: Naming the first that does.
    """
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
                f"target '{name}' is shared with {listed(others)}",
                cause="one module under several names" if same else "tied weights, as of input and output embeddings",
                remedy="leave it out of giva.target-modules, or untie the weights",
            )


def listed(names: Collection[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
