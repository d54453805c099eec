"""The settings of a run: frozen, validated, and with one parser for every source they come from.

The same settings arrive from a TOML file (`giva simulate`, `giva train`), from Flower's run config (flat, dotted,
scalar values) and from a stored run (JSON). All of them pass through `RunConfig.from_flat`. Keys are the field names
with dashes, behind their section: `giva.rank`, `train.learning-rate`.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from .config_checks import check_together
from .errors import ConfigError
from .method_config import LORA_FAMILY as LORA_FAMILY
from .method_config import METHODS as METHODS
from .method_config import LoraConfig, LoraXsConfig, RandloraConfig, VeraConfig
from .settings import Scalar as Scalar
from .settings import Section as Section
from .settings import dashed, help_of, parsed, resolve_path, scalar
from .settings import flatten as flatten
from .settings import option as option
from .task_config import ANSWER_TASKS as ANSWER_TASKS
from .task_config import LEAST_LENGTH as LEAST_LENGTH
from .task_config import TASKS as TASKS
from .task_config import TaskConfig as TaskConfig

INITS = ("rand", "topsv", "secsv", "rowalign")
MODES = ("fedavg", "alternate", "exact")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class ModelConfig(Section):
    """The pretrained model."""

    _prefix = "model."
    path: str = option("", "folder of the model, or its hub id where local-files-only is off")
    revision: str = option("", "hub revision (commit); ignored for folders")
    local_files_only: bool = option(True, "never ask a model hub; the operator may switch this off")
    dtype: str = option("float32", "type of the frozen weights", choices=("float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class GivaConfig(Section):
    """The adapter: Gangwar et al., arXiv:2604.21901; sketches and federation are this project's own."""

    _prefix = "giva."
    rank: int = option(8, "rank r of the bases, those of osora and lora-xs too", minimum=1)
    target_modules: str | tuple[str, ...] = option(
        ALL_LINEAR, "all-linear, a list of module-name endings, or one regular expression for the whole name"
    )
    bases: str = option(
        "gradient",
        "where A comes from: the federation's calibration gradient, or the seed alone, which needs no calibration",
        choices=("gradient", "random"),
    )
    init: str = option("rand", "how B is made", choices=INITS)
    seed: int = option(0, "the shared seed of sketches, bases, heads and data order", minimum=0, maximum=2**63 - 1)
    oversampling: int = option(24, "sketch columns beyond the rank", minimum=0, maximum=64)
    power_passes: int = option(
        1, "power iterations of the sketch; each costs two more passes over the calibration batches", minimum=0
    )
    calibration_batches: int = option(1, "batches per site whose gradient is sketched", minimum=1)
    calibration_batch_size: int = option(32, "examples in a calibration batch", minimum=1)
    sketch_bits: int = option(16, "bits of a sketch entry on the wire", choices=(8, 12, 16, 20))
    dropout: float = option(0.0, "dropout on the adapter's input", minimum=0.0, maximum=0.99)
    modules_to_save: tuple[str, ...] = option((), "further modules trained whole and averaged; the task head always is")
    dtype: str = option("float32", "type of the trained vectors", choices=("float32",))

    def sketch_width(self, r: int, limit: int) -> int:
        """Columns q of a layer's sketch: r (2r for `secsv`) plus oversampling, at most `limit` = min(d_out, d_in)."""
        wanted = (2 * r if self.init == "secsv" else r) + self.oversampling
        return min(wanted, limit)


@dataclass(frozen=True)
class TrainConfig(Section):
    """Local training: AdamW on the trained arrays."""

    _prefix = "train."
    learning_rate: float = option(
        1e-2, "peak learning rate of the vectors, or of what else the method trains", above=0.0
    )
    head_learning_rate: float = option(1e-3, "peak learning rate of the head and of modules_to_save", above=0.0)
    warm_head_learning_rate: float = option(0.0, "peak learning rate of the head rounds; 0: the head's", minimum=0.0)
    warm_head_epochs: float = option(1.0, "passes over the site's data in a head round", above=0.0)
    head_epsilon: float = option(1e-8, "AdamW's epsilon for the head; 1e-2 helps where labels are skewed", above=0.0)
    weight_decay: float = option(0.01, "AdamW's weight decay", minimum=0.0)
    batch_size: int = option(32, "examples in a forward pass", minimum=1)
    accumulation_steps: int = option(1, "forward passes in an optimizer step", minimum=1)
    local_epochs: float = option(1.0, "passes over the site's data in a round; 0.5: a new random half", above=0.0)
    max_local_steps: int = option(0, "optimizer steps in a round at most; 0 means no limit", minimum=0)
    clip_norm: float = option(1.0, "largest norm of a step's gradient; 0 switches clipping off", minimum=0.0)
    warmup_fraction: float = option(0.06, "share of the whole run in which the rate rises", minimum=0.0, maximum=1.0)
    schedule: str = option("linear", "learning rate over the whole run", choices=("linear", "cosine", "constant"))
    precision: str = option(
        "auto",
        "autocast of the forward pass; auto: bfloat16 on CUDA, else none",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    gradient_checkpointing: bool = option(
        False, "keep fewer activations in training and compute them again; needs less memory and more time"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps; a site's own setting comes first")
    num_threads: int = option(
        0,
        "threads of PyTorch on a CPU; sums differ in their last bits with another number. 0: what PyTorch finds",
        minimum=0,
        maximum=256,
    )


@dataclass(frozen=True)
class RoundsConfig(Section):
    """The round loop."""

    _prefix = "rounds."
    num_rounds: int = option(5, "training rounds", minimum=1)
    head_rounds: int = option(0, "rounds that train only the head, before calibration", minimum=0)
    mode: str = option("fedavg", "how the vectors are averaged", choices=MODES)
    fraction_train: float = option(1.0, "share of the sites sampled for training", above=0.0, maximum=1.0)
    fraction_evaluate: float = option(
        1.0, "share of the sites sampled for evaluation; 0 switches it off", minimum=0.0, maximum=1.0
    )
    evaluate_every: int = option(
        1, "rounds from one evaluation to the next, done along with the round after; the last always has one", minimum=1
    )
    min_sites: int = option(
        2, "sites that must be connected before the run starts, and are sampled at least", minimum=1
    )
    quorum: int = option(2, "valid updates a round needs to count; 1 broadcasts a lone site's update", minimum=1)
    deadline_seconds: float = option(3600.0, "seconds a site has to answer", above=0.0)
    join_seconds: float = option(600.0, "seconds to wait for min_sites to connect", above=0.0)
    hello_seconds: float = option(600.0, "seconds a site has to introduce itself; it loads its model then", above=0.0)
    max_site_examples: int = option(
        10_000_000, "most training examples that a site may claim", minimum=1, maximum=2**31 - 1
    )
    retries: int = option(1, "times a round without quorum is tried again", minimum=0)
    max_update_norm: float = option(0.0, "largest norm of an update's change; 0 switches the check off", minimum=0.0)


@dataclass(frozen=True)
class WireConfig(Section):
    """How trained numbers travel; calibration has its own `giva.sketch-bits`."""

    _prefix = "wire."
    precision: str = option(
        "float32",
        "trained numbers as they are, or as differences in two bytes, or in one with error feedback",
        choices=("float32", "float16", "int8"),
    )


@dataclass(frozen=True)
class StrategyConfig(Section):
    """The aggregation strategy: the project's own FedAvg, or one of Flower's by name."""

    _prefix = "strategy."
    name: str = option("fedavg", "fedavg, or a Flower strategy: fedprox, fedadam, fedavgm, fedmedian, krum, ...")
    options: str = option("", 'the strategy\'s own options as a JSON object, e.g. {"eta": 0.1}')

    def parsed_options(self) -> dict[str, Any]:
        """`options` as a dictionary."""
        return json.loads(self.options) if self.options else {}


@dataclass(frozen=True)
class DataConfig(Section):
    """Where simulated sites find their data, and which columns hold what. A deployed site's own settings come first."""

    _prefix = "data."
    folder: str = option("", "simulation only: a folder with one sub-folder for each site")
    train_file: str = option(
        "train.jsonl", "training rows inside a site's folder (jsonl, csv, parquet; images: or a folder)"
    )
    eval_file: str = option("test.jsonl", "evaluation rows inside a site's folder; empty for none")
    text_column: str = option("text", "column of the text")
    text_pair_column: str = option("", "column of a second text, if the task has one")
    label_column: str = option("label", "column of the label; several labels are separated by |")
    prompt_column: str = option("prompt", "column of the prompt, where answers are texts")
    completion_column: str = option("completion", "column of the answer to the prompt")
    messages_column: str = option(
        "", "column of a chat, a list of role and content, instead of prompt and answer; needs prompt-format = chat"
    )
    image_column: str = option("image", "column of the images, as the bytes of a file")
    options_column: str = option(
        "options", "column of the possible answers, a list or separated by |; rows may lack it"
    )


@dataclass(frozen=True)
class RunConfig(Section):
    """Everything a run needs to know; equal at the server and at every site, which `digest` proves."""

    name: str = option("", "a name for the run, for people")
    method: str = option("giva", "what is trained beside the head", choices=METHODS)
    resume: str = option("", "id of a stored run that this one continues")
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    giva: GivaConfig = field(default_factory=GivaConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    vera: VeraConfig = field(default_factory=VeraConfig)
    randlora: RandloraConfig = field(default_factory=RandloraConfig)
    lora_xs: LoraXsConfig = field(default_factory=LoraXsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_together(self)

    @property
    def has_bases(self) -> bool:
        """Whether the sites agree on bases before they train."""
        return self.method == "giva" or (self.method == "lora-xs" and self.lora_xs.bases == "gradient")

    @property
    def is_calibrated(self) -> bool:
        """Whether these bases come from the federation's gradient, which it sketches for this run."""
        return self.has_bases and self.bases.bases == "gradient"

    @property
    def rank(self) -> int:
        """The rank of the run's method; 0 where it has none."""
        if self.method in LORA_FAMILY:
            return self.lora.rank
        ranks = {"vera": self.vera.rank, "randlora": self.randlora.rank, "full": 0, "head": 0}
        return ranks.get(self.method, self.giva.rank)

    @property
    def bases(self) -> GivaConfig:
        """The settings of the run's bases: `giva`'s, but methods that need singular vectors on both sides get them."""
        return self.giva if self.method == "giva" else replace(self.giva, bases="gradient", init="topsv")

    # -- sources ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Self:
        """Parse dotted, dashed keys, as Flower's run config has them; unknown ones are refused with the nearest."""
        known = option_types()
        values: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            section, _, name = key.rpartition(".")
            values.setdefault(section, {})[name.replace("-", "_")] = parsed(key, value, known)
        top = values.pop("", {})
        sections = typing.get_type_hints(cls)
        return cls(**top, **{name: sections[name](**items) for name, items in values.items()})

    @classmethod
    def from_nested(cls, nested: Mapping[str, Any]) -> Self:
        """Parse nested tables, as TOML and JSON have them."""
        return cls.from_flat(flatten(nested))

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a TOML file; flat `overrides` come first. Relative folders count from the file's folder."""
        path = Path(path)
        try:
            flat = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"there is no configuration file {path}", remedy="check the path") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML", got=error, remedy="correct the file") from None
        for key in ("data.folder", "model.path"):
            value = flat.get(key)
            if isinstance(value, str) and value:
                flat[key] = resolve_path(value, path.parent)
        return cls.from_flat({**flat, **(overrides or {})})

    # -- forms --------------------------------------------------------------------------------------------------------

    def to_flat(self) -> dict[str, Scalar]:
        """The inverse of `from_flat`: scalar values only, lists as JSON text."""
        return {key: scalar(value) for key, value, _ in _walk(self)}

    def to_json(self) -> str:
        """JSON of the flat form, keys sorted."""
        return json.dumps(self.to_flat(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls.from_flat(json.loads(text))

    def digest(self) -> str:
        """SHA-256 (hex) of everything that must be equal at the server and at every site.

        Where data and model lie, how they are named and which device computes are each side's own affair.
        """
        local = {
            "name",
            "resume",
            "model.path",
            "model.local-files-only",
            "train.device",
            *(key for key in option_types() if key.startswith("data.")),
        }
        shared = {key: value for key, value in self.to_flat().items() if key not in local}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()

    def replace(self, **flat: Any) -> Self:
        """A copy with some settings changed, named as in Python with the section first: `rounds__num_rounds=3`."""
        changes = {key.replace("__", ".").replace("_", "-"): value for key, value in flat.items()}
        return type(self).from_flat({**self.to_flat(), **changes})


def option_types() -> dict[str, Any]:
    """Type by flat key of every setting."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(RunConfig).items():
        if isinstance(hint, type) and issubclass(hint, Section):
            inner = typing.get_type_hints(hint)
            found.update({f"{name}.{dashed(spec.name)}": inner[spec.name] for spec in fields(hint)})  # type: ignore[arg-type]
        elif name != "_prefix":
            found[dashed(name)] = hint
    return found


def describe_options() -> list[tuple[str, str, str]]:
    """`(key, default, help)` of every setting, in order: what docs/configuration.md and `--help` show."""
    return [(key, str(scalar(value)), help_of(metadata)) for key, value, metadata in _walk(RunConfig())]


def _walk(config: RunConfig) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Flat key, value and field metadata of every setting, in order."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, Section):
            for inner in fields(value):  # type: ignore[arg-type]
                yield f"{spec.name}.{dashed(inner.name)}", getattr(value, inner.name), inner.metadata
        else:
            yield dashed(spec.name), value, spec.metadata


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["giva.rank=8", "task.head=mean"]` → flat settings; values as in TOML, bare words as text."""
    flat: dict[str, Any] = {}
    known = option_types()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError("a setting has no value", got=repr(assignment), expected="KEY=VALUE")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if not isinstance(value, str) and known.get(key.strip()) is str:
            value = text  # a name, run id or revision that happens to look like a number or a date
        flat[key.strip()] = value
    return flat
