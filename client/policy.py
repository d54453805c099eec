"""What a deployed site lets a server ask of it. The run's configuration is the server's word; these limits are not.

They keep what leaves the site a mean over enough examples, and the calibration sketches a small part of the gradient:
a layer's gradient `G (d_out, d_in)` is known to whoever has `min(d_out, d_in)` independent columns of `Gᵀ M` or `G M`.
A limit counts within one run; that the same server starts many runs is the operator's to notice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from giva_core import calibration
from giva_core.config import GivaConfig, RunConfig
from giva_core.errors import ConfigError, DataError, ProtocolError
from giva_core.types import ModelSchema

_PREFIXES = ("allow-", "allowed-", "min-", "max-")
_NOT_HERE = ("allow-model-hub",)


@dataclass(frozen=True)
class Policy:
    """A site's limits; a key of the node's configuration for each, with dashes.

    Attributes:
        allowed_methods: Methods that a run may use, separated by commas.
        allow_modules_to_save: Whether a run may train, and so send, modules beside the head.
        allow_share_counts: Whether per-class counts leave where the run asks for them; else they stay, silently.
        max_sketch_share: Columns of a layer's sketches of one side, over all passes, as a share of min(d_out, d_in).
        min_calibration_examples: Least examples in a calibration sketch.
        min_train_examples: Least training rows of this site.
        min_eval_examples: With fewer evaluation rows the site says that it has none.
        min_round_examples: Least examples that a round's update comes from.
    """

    allowed_methods: tuple[str, ...] = ("giva", "head")
    allow_modules_to_save: bool = False
    allow_share_counts: bool = False
    max_sketch_share: float = 0.5
    min_calibration_examples: int = 8
    min_train_examples: int = 8
    min_eval_examples: int = 8
    min_round_examples: int = 8

    @classmethod
    def from_node_config(cls, node_config: Mapping[str, Any]) -> Self:
        """Read the limits that the node's configuration sets; the others keep their defaults.

        Raises:
            ConfigError: A value has another type, or a key looks like a limit and is none: a typing error must not
                leave a site with less protection than its operator meant.
        """
        defaults = {spec.name: spec.default for spec in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in node_config.items():
            name = key.replace("-", "_")
            if name in defaults:
                values[name] = _read(key, value, defaults[name])
            elif key.replace("_", "-").startswith(_PREFIXES) and key.replace("_", "-") not in _NOT_HERE:
                raise ConfigError(
                    f"the node's configuration has no setting '{key}'",
                    expected=f"one of {', '.join(name.replace('_', '-') for name in defaults)}",
                    public="the node's configuration is not valid",
                )
        return cls(**values)

    def check_run(self, config: RunConfig) -> None:
        """Refuse a run by its configuration alone, before a model is loaded or a row is read."""
        if config.method not in self.allowed_methods:
            raise _refusal(f"the method {config.method}", "allowed-methods")
        if config.giva.modules_to_save and not self.allow_modules_to_save:
            raise _refusal("giva.modules-to-save", "allow-modules-to-save")

    def check_sketches(self, schema: ModelSchema, giva: GivaConfig) -> None:
        """Refuse sketches that together could give a layer's whole gradient away."""
        plan = calibration.stages(giva)
        for layer, r in zip(schema.layers, schema.ranks, strict=True):
            columns: Counter[str] = Counter()
            for stage in plan:
                columns[stage.side] += calibration.width(stage, layer, r, giva)
            if max(columns.values()) > self.max_sketch_share * min(layer.d_out, layer.d_in):
                raise _refusal("sketches as wide as giva.rank and giva.power-passes make them", "max-sketch-share")

    def check_rows(self, num_train: int, calibration_examples: int, round_examples: int) -> None:
        """Refuse where too few examples would stand behind what leaves: rows, those of a sketch, those of a round."""
        for count, key in (
            (num_train, "min-train-examples"),
            (calibration_examples, "min-calibration-examples"),
            (round_examples, "min-round-examples"),
        ):
            least = getattr(self, key.replace("-", "_"))
            if count < least:
                raise DataError(
                    "too few examples would stand behind what leaves this site",
                    got=count,
                    expected=f"{key} = {least}",
                    cause="a small file, or small batches or few steps in the run's configuration",
                    remedy=f"have the run use more examples, or lower {key} in the node's configuration",
                    public=f"fewer examples than the site's {key}",
                )

    def check_question(self, stage: str, asked: int, giva: GivaConfig) -> None:
        """Refuse a calibration question beyond the plan.

        The multipliers of a later pass come from the server, which could otherwise ask for the gradient column by
        column.

        Args:
            stage: The stage asked for.
            asked: Different questions of this stage in this run, with this one.
            giva: The run's plan.
        """
        if asked > [planned.name for planned in calibration.stages(giva)].count(stage):
            raise ProtocolError(
                "more calibration questions than the run's plan has",
                got=f"{asked} of the stage {stage}",
                remedy="start a new run",
                public="more calibration questions than planned",
            )


def _read(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple) and isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) or (not isinstance(value, bool) and not value >= 0):
        raise ConfigError(
            f"{key} in the node's configuration is not usable",
            got=repr(value),
            expected=f"a value like {str(default).lower()}",
            public="the node's configuration is not valid",
        )
    return value


def _refusal(what: str, key: str) -> ConfigError:
    return ConfigError(
        f"the run asks for {what}, which this site's policy does not allow",
        cause="the run's configuration is the server's word",
        remedy=f"change the run, or set {key} in the node's configuration",
        public=f"the site's {key} does not allow {what}",
    )
