"""Connections to SuperLinks: where Flower keeps them, and why one of them does not work.

`flwr` reads connections from `$FLWR_HOME/config.toml` (`~/.flwr`), by name, and one of them is the default. Of a
connection that fails it says no more than that it is unavailable; `diagnose` opens one itself and tells what is wrong.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from giva_core.errors import ConfigError, GivaError

#: Connections that Flower's own file comes with; none of them is a federation of ours.
_FLOWERS_OWN = ("local", "supergrid")
_PROBE_SECONDS = 10.0
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

# X509_V_ERR_* of OpenSSL, by what the operator has to do
_NOT_YET, _ENDED = 9, 10
_UNTRUSTED = {2, 18, 19, 20, 21}
_OTHER_NAME = {62, 64}


class SuperLinkError(GivaError):
    """A SuperLink cannot be reached, or refuses what it is asked."""

    kind = "superlink"


@dataclass(frozen=True)
class Connection:
    """How a SuperLink is reached.

    Attributes:
        name: What the operator calls it.
        address: `host:port`.
        root_certificates: File of the authority that signed its certificate; empty for the system's authorities.
        insecure: Without TLS.
    """

    name: str
    address: str
    root_certificates: str = ""
    insecure: bool = False

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The two parts of the address.

        Raises:
            ConfigError: It does not have two.
        """
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
            raise ConfigError(
                "the SuperLink's address has not the right form",
                got=repr(self.address),
                expected="HOST:PORT, e.g. superlink.example.org:8000",
            )
        return host.strip("[]"), int(port)


# -- Flower's file ----------------------------------------------------------------------------------------------------


def config_file() -> Path:
    """`$FLWR_HOME/config.toml`, or `~/.flwr/config.toml`."""
    return Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser() / "config.toml"


def connections() -> tuple[dict[str, Connection], str | None]:
    """All connections by name, without those that Flower brings along; and which of them is the default."""
    table = _read().get("superlink", {})
    found = {}
    for name, value in table.items():
        if name not in _FLOWERS_OWN and isinstance(value, Mapping) and isinstance(value.get("address"), str):
            certificates, insecure = str(value.get("root-certificates", "")), value.get("insecure") is True
            found[name] = Connection(name, value["address"], certificates, insecure)
    default = table.get("default")
    return found, default if default in found else None


def find_connection(name: str | None) -> Connection:
    """The connection of that name, or the default.

    Raises:
        ConfigError: There is none.
    """
    found, default = connections()
    known = ", ".join(sorted(found)) or "none yet"
    remedy = "add one with `giva superlink add NAME HOST:PORT --root-certificates ca.crt`"
    if name is None and default is None:
        raise ConfigError(
            "it is not said which SuperLink is meant", expected=f"--superlink with one of: {known}", remedy=remedy
        )
    chosen = str(name or default)
    if chosen not in found:
        raise ConfigError(f"there is no SuperLink connection '{chosen}'", expected=f"one of: {known}", remedy=remedy)
    return found[chosen]


def add_connection(connection: Connection) -> Path:
    """Write a connection into Flower's file and make it the default; one of that name is replaced.

    Raises:
        ConfigError: The name or the address is none, or the file cannot be read or written.
    """
    from .array_files import write_atomically

    if not _BARE_KEY.fullmatch(connection.name) or connection.name in ("default", *_FLOWERS_OWN):
        raise ConfigError(
            "a connection cannot have this name",
            got=repr(connection.name),
            expected=f"letters, digits, '_' and '-', not default, {' or '.join(_FLOWERS_OWN)}",
        )
    _ = connection.host_and_port
    content = _read()
    entry: dict[str, Any] = {"address": connection.address}
    if connection.insecure:
        entry["insecure"] = True
    elif connection.root_certificates:
        entry["root-certificates"] = connection.root_certificates
    content["superlink"] = {**content.get("superlink", {}), "default": connection.name, connection.name: entry}
    file = config_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, toml_text(content).encode())
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written", got=error.strerror, remedy="set FLWR_HOME to a folder of yours"
        ) from error
    return file


def _read() -> dict[str, Any]:
    file = config_file()
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read", got=error, remedy="correct the file, or move it away") from error


def toml_text(tables: Mapping[str, Any]) -> str:
    """TOML of nested tables of text, numbers, booleans, dates and lists of them."""
    return "\n".join(_table_lines(tables, ())) + "\n"


def _table_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"[{'.'.join(map(_key, path))}]"] if path and (values or not table) else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in values.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _table_lines(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for the one control character that JSON lets pass
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool | int):
        return json.dumps(value)
    return repr(value) if isinstance(value, float) else str(value)  # dates and times


# -- what is wrong ----------------------------------------------------------------------------------------------------


def diagnose(connection: Connection) -> datetime | None:
    """Reach the SuperLink and check its certificate as `flwr` would.

    Returns:
        When the SuperLink's certificate ends; None without TLS.

    Raises:
        SuperLinkError: It cannot be reached or trusted; what is wrong and what to do about it.
    """
    host, port = connection.host_and_port
    at = f"SuperLink {connection.name} ({connection.address})"
    context = None if connection.insecure else _tls_context(connection)
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS) as channel:
            if context is None:
                _ask_health(channel, connection)
                return None
            with context.wrap_socket(channel, server_hostname=host) as secured:
                ends = (secured.getpeercert() or {}).get("notAfter")
                return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(ends)), UTC)
    except ssl.SSLCertVerificationError as error:
        raise _distrusted(at, error, connection) from error
    except (ssl.SSLError, ConnectionResetError) as error:
        raise _other_protocol(at, connection, error) from error
    except socket.gaierror as error:
        raise SuperLinkError(
            f"{at} has a name that nobody knows", got=error.strerror, remedy="correct the address, or the name service"
        ) from error
    except TimeoutError as error:
        raise SuperLinkError(
            f"{at} does not answer",
            got=f"nothing within {_PROBE_SECONDS:g} s",
            cause="a firewall, or the machine is down",
            remedy="let the operator's machine reach that port",
        ) from error
    except OSError as error:
        raise SuperLinkError(
            f"{at} cannot be reached",
            got=error.strerror or type(error).__name__,
            cause="it is not started, or listens on another address or port",
            remedy="start it, or correct the address with `giva superlink add`",
        ) from error


def _tls_context(connection: Connection) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=connection.root_certificates or None)
    except (OSError, ssl.SSLError) as error:
        raise SuperLinkError(
            f"the root certificates of SuperLink {connection.name} cannot be read",
            got=f"{connection.root_certificates}: {error.strerror}",
            expected="a PEM file with the certificate of the authority, ca.crt",
            remedy="correct the path with `giva superlink add`",
        ) from error


def _ask_health(channel: socket.socket, connection: Connection) -> None:
    channel.sendall(f"GET /health HTTP/1.0\r\nHost: {connection.address}\r\n\r\n".encode())
    if not channel.recv(64).startswith(b"HTTP/"):
        raise ConnectionResetError("it answered, but not in HTTP")


def _other_protocol(at: str, connection: Connection, error: OSError) -> SuperLinkError:
    if connection.insecure:
        return SuperLinkError(
            f"{at} does not answer without TLS",
            got=error,
            cause="it asks for TLS, and the connection was added with --insecure",
            remedy="add the connection again with --root-certificates",
        )
    if isinstance(error, ConnectionResetError) and error.errno is not None:  # ours, for what is no HTTP, has no number
        return SuperLinkError(
            f"{at} closed the connection",
            got=error.strerror,
            cause="it was just being started or stopped, or refuses this machine's address",
            remedy="try again; if it stays so, look at the SuperLink's log",
        )
    return SuperLinkError(
        f"{at} does not speak TLS",
        got=error.reason if isinstance(error, ssl.SSLError) else error,
        cause="it was started with --insecure, or something else listens there",
        remedy="start it with its certificate; only where you mean it, add the connection again with --insecure",
    )


def _distrusted(at: str, error: ssl.SSLCertVerificationError, connection: Connection) -> SuperLinkError:
    code = error.verify_code
    cause: str | None
    if code == _ENDED:
        what = "has a certificate that has expired"
        cause = "it was not renewed in time, or this machine's clock is wrong"
        remedy = "renew the SuperLink's certificate and restart it; with deploy/make-certificates.sh run that again"
    elif code == _NOT_YET:
        what, cause = "has a certificate that is not valid yet", "this machine's clock, or the SuperLink's, is wrong"
        remedy = "set the clock"
    elif code in _OTHER_NAME:
        what, cause = "has a certificate for another name", "the address is not among the certificate's names (SANs)"
        remedy = "use an address that the certificate names, or make a certificate with this one: --host"
    elif code in _UNTRUSTED:
        what = "has a certificate that is not trusted"
        cause = f"it was not signed by the authority in {connection.root_certificates or 'the system'}"
        remedy = "get the authority's ca.crt from the SuperLink's operator, and `giva superlink add` it"
    else:
        what, cause, remedy = "has a certificate that is refused", None, "make a new one; see docs/deploy.md"
    return SuperLinkError(f"{at} {what}", got=error.verify_message, cause=cause, remedy=remedy)
