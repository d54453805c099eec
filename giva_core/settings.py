"""What a setting is: a field with a default, a help text and limits; and how a file's value becomes one of its type."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Self

from .errors import ConfigError
from .paths import expand

Scalar = str | int | float | bool


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """A config field: its default, its help text and the values it accepts."""
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    return field(default=default, metadata={"help": help, **limits})


class Section:
    """Base of the frozen sections: every field is checked against its limits when the section is made."""

    _prefix: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        for spec in fields(self):  # type: ignore[arg-type]
            _check_limits(f"{self._prefix}{dashed(spec.name)}", getattr(self, spec.name), spec.metadata)

    def to_json(self) -> str:
        """JSON of the section's fields, named as in TOML, keys sorted."""
        values = {dashed(spec.name): getattr(self, spec.name) for spec in fields(self)}  # type: ignore[arg-type]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; unknown keys are refused."""
        hints = typing.get_type_hints(cls)
        known = {f"{cls._prefix}{dashed(spec.name)}": hints[spec.name] for spec in fields(cls)}  # type: ignore[arg-type]
        values = flatten(json.loads(text), cls._prefix)
        return cls(**{key.rpartition(".")[2].replace("-", "_"): parsed(key, values[key], known) for key in values})


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"giva": {"rank": 8}}` → `{"giva.rank": 8}`; a table under `strategy.options` becomes JSON text."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if name == "strategy.options" and isinstance(value, Mapping):
            flat[name] = json.dumps(value, sort_keys=True)
        elif isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


# -- single values ---------------------------------------------------------------------------------------------------


def parsed(key: str, value: Any, known: Mapping[str, Any]) -> Any:
    """A value as its setting's type; `known` has the type of every setting by key.

    Raises:
        ConfigError: There is no such setting, or the value is not of its type.
    """
    if key not in known:
        raise ConfigError(
            f"there is no setting '{key}'",
            expected=_nearest(key, known),
            cause="a typing error, or a setting of another version",
        )
    return _convert(key, value, known[key])


def dashed(name: str) -> str:
    """A field's name as files have it."""
    return name.replace("_", "-")


def help_of(metadata: Mapping[str, Any]) -> str:
    """A field's help text with what it accepts."""
    text = metadata["help"]
    return f"{text} ({', '.join(map(str, metadata['choices']))})" if metadata["choices"] else text


def scalar(value: Any) -> Scalar:
    """A value as Flower's run config takes it: lists as JSON text."""
    return json.dumps(list(value), ensure_ascii=False) if isinstance(value, tuple) else value


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    import difflib

    if same := [name for name in known if name.endswith(f".{key}")]:  # the section was left out
        return " or ".join(f"'{name}'" for name in same)
    close = difflib.get_close_matches(key, known, n=1)
    return f"'{close[0]}'" if close else f"one of {', '.join(sorted(known))}"


def resolve_path(value: str, base: Path) -> str:
    """A path that begins with `.`, `~` or `$GIVA_HOME` or exists beside the file becomes absolute; a hub id stays."""
    path = expand(value)
    if not path.is_absolute() and (value.startswith(".") or (base / path).exists()):
        path = (base / path).resolve()
    return str(path) if path.is_absolute() else value


def _convert(key: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):  # the only union: a name, or a list of names
        return _names(key, value) if _is_list(value) else _convert(key, value, str)
    if typing.get_origin(hint) is tuple:
        return _names(key, value)
    if hint is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif hint is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(
            f"{key} has the wrong type", got=f"{value!r} ({type(value).__name__})", expected=hint.__name__
        )
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip().startswith("["))


def _names(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value == "":
        return ()
    if isinstance(value, str):
        try:
            names = json.loads(value)
        except json.JSONDecodeError:
            names = None
    else:
        names = value
    if not isinstance(names, list | tuple) or not all(isinstance(item, str) for item in names):
        raise ConfigError(f"{key} is not a list of names", got=repr(value), expected='e.g. ["first", "second"]')
    return tuple(names)


def _check_limits(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    if not limits or isinstance(value, Section):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is not a finite number", got=value)
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(
            f"{key} is not a known choice", got=repr(value), expected=f"one of {', '.join(map(str, limits['choices']))}"
        )
    if limits["minimum"] is not None and value < limits["minimum"]:
        raise ConfigError(f"{key} is too small", got=value, expected=f"at least {limits['minimum']}")
    if limits["maximum"] is not None and value > limits["maximum"]:
        raise ConfigError(f"{key} is too large", got=value, expected=f"at most {limits['maximum']}")
    if limits["above"] is not None and value <= limits["above"]:
        raise ConfigError(f"{key} is too small", got=value, expected=f"more than {limits['above']}")
