"""`site.toml`: what a site says for itself, read once when its worker starts. The server's word does not count here.

    name = "hospital-a"

    [data]
    folder = "/srv/giva/data"

    [models.all-MiniLM-L6-v2]
    path = "/srv/giva/models/all-MiniLM-L6-v2"

Every other key has a default. An unknown key, or a value of another type, is refused: a typing error must not leave a
site with less protection than its operator meant.
"""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from giva_core.config import DataConfig, RunConfig
from giva_core.errors import ConfigError
from giva_core.paths import expand
from giva_core.settings import Section, option

from .policy import Policy, PolicyError
from .site import SiteSettings, checked_name

_Table = TypeVar("_Table", bound=Section)


@dataclass(frozen=True)
class SiteModel(Section):
    """A base model that runs may use: the table `[models.NAME]`."""

    _prefix = "models.NAME."
    path: str = option("", "folder of the model")
    digest: str = option("", "SHA-256 as `giva site check` prints it; empty: whatever lies in the folder")


@dataclass(frozen=True)
class WorkerSettings(Section):
    """The process that works: the table `[worker]`."""

    _prefix = "worker."
    socket: str = option("/run/giva/worker.sock", "Unix socket at which the messenger asks")
    cache: str = option("/var/lib/giva", "folder for bases and for what was asked; GIVA_HOME of the worker")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    task_seconds: float = option(3600.0, "longest time of a task; then it is killed", above=0.0)
    memory_gib: float = option(0.0, "most memory of the process that holds the model; 0: no limit", minimum=0.0)
    queue: int = option(4, "tasks that may wait; beyond them the answer is busy", minimum=0, maximum=64)
    message_mib: int = option(
        64,
        "longest message that the worker takes, in MiB; plan memory for 2 (queue + 1) + 5 of them beside the model",
        minimum=1,
        maximum=2047,
    )
    network: str = option(
        "none",
        "none: the worker cuts itself off the network, and does not start where it cannot; host: it stays",
        choices=("none", "host"),
    )


@dataclass(frozen=True)
class SuperLinkSettings(Section):
    """Where `giva site start` connects to: the table `[superlink]`."""

    _prefix = "superlink."
    address: str = option("", "host:port of the SuperLink")
    root_certificates: str = option("", "the certificate authority that signed the SuperLink's certificate")
    key: str = option("", "this site's private key; its public half is approved at the SuperLink")
    insecure: bool = option(False, "connect without TLS; for tests on one machine")


@dataclass(frozen=True)
class SiteFile:
    """A site's own configuration.

    Attributes:
        name: What the operator knows the site by.
        data: Folder, files and columns; `folder` is absolute.
        models: The base models that runs may use, by name; their paths are absolute, or hub ids.
        policy: What a server may ask.
        worker: How the worker works; its paths are absolute.
        superlink: Where to connect to; its paths are absolute.
    """

    name: str
    data: DataConfig
    models: Mapping[str, SiteModel]
    policy: Policy = field(default_factory=Policy)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    superlink: SuperLinkSettings = field(default_factory=SuperLinkSettings)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and check a site file; relative paths count from its folder.

        Raises:
            ConfigError: It is missing, no TOML, or says what it cannot mean; the message names the key.
        """
        path = Path(path)
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no site file {path}", remedy="check the path") from None
        except OSError as error:
            raise ConfigError(f"the site file {path} cannot be read", got=error.strerror) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML", got=error, remedy="correct the file") from None
        return cls.from_tables(tables, path.resolve().parent)

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], base: Path) -> Self:
        """Check what a site file says; relative paths count from `base`."""
        _refuse_unknown("", tables, [spec.name for spec in fields(cls)])
        for key in ("name", "data", "models"):
            if not tables.get(key):
                raise ConfigError(f"the site file has no {key}", expected=_EXPECTED[key])
        data = _section(DataConfig, "data", tables["data"])
        if not data.folder:
            raise ConfigError("the site file has no data.folder", expected="the folder of the site's rows")
        policy = _section(Policy, "policy", tables.get("policy", {}))
        worker = _section(WorkerSettings, "worker", tables.get("worker", {}))
        superlink = _section(SuperLinkSettings, "superlink", tables.get("superlink", {}))
        if policy.allow_model_hub and worker.network != "host":
            raise ConfigError(
                "a worker without a network cannot ask a model hub",
                got="policy.allow-model-hub = true, worker.network = none",
                remedy='set worker.network = "host", or keep the model in a folder',
            )
        return cls(
            name=checked_name(_typed("name", tables["name"], str)),
            data=replace(data, folder=_path(data.folder, base)),
            models=_models(tables["models"], base, policy.allow_model_hub),
            policy=policy,
            worker=replace(worker, socket=_path(worker.socket, base), cache=_path(worker.cache, base)),
            superlink=replace(
                superlink,
                root_certificates=_path(superlink.root_certificates, base),
                key=_path(superlink.key, base),
            ),
        )

    def local_config(self, config: RunConfig) -> RunConfig:
        """The run's configuration with what only the site decides: which folder is read, and whether a hub is asked.

        Raises:
            PolicyError: The run's model is none of the site's.
        """
        model = self._model(config)
        is_offline = config.model.local_files_only or not self.policy.allow_model_hub
        return replace(config, model=replace(config.model, path=model.path, local_files_only=is_offline))

    def settings(self, config: RunConfig) -> SiteSettings:
        """The site as its trainer sees it, for this run."""
        folder, digest = Path(self.data.folder), self._model(config).digest
        return SiteSettings(self.name, folder, replace(self.data, folder=""), self.worker.device, self.policy, digest)

    def _model(self, config: RunConfig) -> SiteModel:
        wanted = PurePosixPath(config.model.path).name
        if wanted not in self.models:
            raise PolicyError(
                f"the run's model '{wanted}' is none of this site's",
                expected=f"one of {', '.join(self.models)}",
                cause="the last part of the run's model.path is another name than under [models] in the site file",
                remedy="change model.path of the run, or add the model to the site file",
                public="the site's models do not include the run's",
            )
        return self.models[wanted]


_EXPECTED = {
    "name": 'the site\'s name, e.g. name = "hospital-a"',
    "data": "a table [data] with the folder of the site's rows",
    "models": "a table [models.NAME] with the path of a base model",
}


def describe() -> list[tuple[str, str, str]]:
    """`(key, default, help)` of every key of a site file, for docs/configuration.md."""
    rows = [("name", "required", "the site's name: letters, digits, `.`, `_`, `-`")]
    for section in (DataConfig, SiteModel, Policy, WorkerSettings, SuperLinkSettings):
        for spec in fields(section):
            key = f"{section._prefix}{_dashed(spec.name)}"
            if key == "data.folder":  # a run's setting of this name is for simulations
                rows.append((key, "required", "folder of the site's rows"))
            else:
                default = "required" if key == "models.NAME.path" else _shown(spec.default)
                rows.append((key, default, spec.metadata["help"]))
    return rows


def _models(tables: Any, base: Path, is_hub_allowed: bool) -> dict[str, SiteModel]:
    found: dict[str, SiteModel] = {}
    for name, table in _typed("models", tables, dict).items():
        model = _section(SiteModel, f"models.{name}", table)
        if not model.path:
            raise ConfigError(f"the site file has no models.{name}.path", expected="the folder of the model")
        path = _path(model.path, base)
        found[name] = model if is_hub_allowed and not Path(path).is_dir() else replace(model, path=path)
    return found


def _section(kind: type[_Table], name: str, table: Any) -> _Table:
    """One table as its frozen section; every value has exactly the type of its default."""
    table = _typed(name, table, dict)
    hints = typing.get_type_hints(kind)
    names = {_dashed(spec.name): spec.name for spec in fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(f"{name}.", table, list(names))
    return kind(**{names[key]: _typed(f"{name}.{key}", value, hints[names[key]]) for key, value in table.items()})


def _typed(key: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(f"{key} in the site file is no list of names", got=repr(value), expected='e.g. ["giva"]')
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
        raise ConfigError(f"{key} in the site file has the wrong type", got=repr(value), expected=names[hint])
    return value


def _refuse_unknown(prefix: str, table: Mapping[str, Any], known: list[str]) -> None:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"the site file has no key '{prefix}{key}'",
                expected=f"'{prefix}{close[0]}'" if close else f"one of {', '.join(known)}",
                cause="a typing error, or a key of another version",
            )


def _path(text: str, base: Path) -> str:
    """`text` as an absolute path; empty stays empty."""
    return str(base / expand(text)) if text else ""


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)
