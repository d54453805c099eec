"""Connections to SuperLinks: Flower's file is kept whole, and every way to fail is told apart."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from giva_core.errors import ConfigError
from server.connections import (
    Connection,
    SuperLinkError,
    add_connection,
    config_file,
    connections,
    diagnose,
    find_connection,
    toml_text,
)

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    return tmp_path


# -- Flower's file ----------------------------------------------------------------------------------------------------


def test_a_connection_is_added_beside_what_is_there() -> None:
    config_file().parent.mkdir()
    config_file().write_text(
        '[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n'
        '[superlink."a.b"]\naddress = "h:1"\ninsecure = true\n[other]\nx = [1, 2.5]\nsince = 2026-01-02\n'
    )
    before = tomllib.loads(config_file().read_text())
    add_connection(Connection("clinic", "superlink.example.org:8443", "/etc/giva/ca.crt"))
    after = tomllib.loads(config_file().read_text())
    entry = {"address": "superlink.example.org:8443", "root-certificates": "/etc/giva/ca.crt"}
    assert after["superlink"].pop("clinic") == entry
    assert after["superlink"].pop("default") == "clinic" and before["superlink"].pop("default") == "local"
    assert after == before
    found, default = connections()
    assert set(found) == {"a.b", "clinic"} and default == "clinic"
    assert find_connection(None) == find_connection("clinic") == found["clinic"]
    assert found["a.b"] == Connection("a.b", "h:1", insecure=True)


def test_the_last_one_added_is_the_default_and_replaces_its_namesake() -> None:
    add_connection(Connection("a", "h:1", insecure=True))
    add_connection(Connection("b", "h:2"))
    add_connection(Connection("a", "h:3"))
    assert find_connection(None) == Connection("a", "h:3")


def test_flower_s_own_connections_are_none_of_ours() -> None:
    with pytest.raises(ConfigError, match=r"not said which SuperLink is meant.*none yet.*giva superlink add"):
        find_connection(None)
    config_file().parent.mkdir()
    config_file().write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
    for name in (None, "local", "nowhere"):
        with pytest.raises(ConfigError, match="none yet"):
            find_connection(name)


@pytest.mark.parametrize("name", ["", "a b", "default", "local", "a.b"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot have this name"):
        add_connection(Connection(name, "h:1"))
    assert not config_file().exists()


@pytest.mark.parametrize("address", ["host", "host:", ":8000", "host:x", "host:70000", "https://host:8000"])
def test_addresses_that_cannot_be(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        add_connection(Connection("a", address))


def test_an_address_of_ip_6() -> None:
    assert Connection("a", "[::1]:8000").host_and_port == ("::1", 8000)


def test_a_damaged_file_is_not_overwritten() -> None:
    config_file().parent.mkdir()
    config_file().write_text("[superlink\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        add_connection(Connection("a", "h:1"))
    assert config_file().read_text() == "[superlink\n"


def test_toml_text_is_read_back() -> None:
    tables = {
        "text": 'a "b" \\ ü\n\x7f\x01',
        "flags": [True, False],
        "numbers": [1, -2, 1e-8, 0.1],
        "inline": [{"a": 1, "b c": "x"}],
        "empty": {},
        "deep": {"x.y": {"z": 1}},
    }
    assert tomllib.loads(toml_text(tables)) == tables


# -- what is wrong ----------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority that signs whatever it is asked to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])
        folder.mkdir()
        certificate = self._builder(self.name, self.key, NOW - timedelta(days=9), NOW + timedelta(days=9))
        certificate = certificate.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.file = folder / "ca.crt"
        self.file.write_bytes(certificate.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def server(self, host: str, begins: datetime, ends: datetime) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SuperLink")])
        alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        built = self._builder(subject, key, begins, ends).add_extension(alternative, critical=False)
        certificate, private = self.folder / "server.crt", self.folder / "server.key"
        certificate.write_bytes(built.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, private)
        return context

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, begins: datetime, ends: datetime
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(begins).not_valid_after(ends)


@pytest.fixture
def authority(home: Path) -> Authority:
    return Authority(home / "own")


class Server:
    """Answers each connection with HTTP, with or without TLS."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.listener, self.context = socket.create_server(("127.0.0.1", 0)), context
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                channel, _ = self.listener.accept()
            except OSError:
                return
            with channel:
                try:
                    channel.settimeout(5)
                    secured = self.context.wrap_socket(channel, server_side=True) if self.context else channel
                    known = secured.recv(4096).startswith(b"GET /health")
                    secured.sendall(b"HTTP/1.1 200 OK\r\n\r\n" if known else b"HTTP/1.1 400 Bad Request\r\n\r\n")
                except OSError:
                    continue  # the other side did not like the certificate

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.fixture
def serve() -> Iterator[type[Server]]:
    made: list[Server] = []

    class Kept(Server):
        def __init__(self, context: ssl.SSLContext | None) -> None:
            super().__init__(context)
            made.append(self)

    yield Kept
    for server in made:
        server.close()


def test_a_good_certificate_and_when_it_ends(authority: Authority, serve: type[Server]) -> None:
    ends = NOW + timedelta(days=3)
    server = serve(authority.server("127.0.0.1", NOW - timedelta(days=1), ends))
    assert diagnose(Connection("a", server.address, str(authority.file))) == ends


@pytest.mark.parametrize(
    ("host", "days", "words"),
    [
        ("127.0.0.1", (-5, -1), "has a certificate that has expired.*renew"),
        ("127.0.0.1", (2, 5), "not valid yet.*set the clock"),
        ("127.0.0.9", (-1, 5), "for another name.*--host"),
    ],
)
def test_a_bad_certificate(
    authority: Authority, serve: type[Server], host: str, days: tuple[int, int], words: str
) -> None:
    begins, ends = (NOW + timedelta(days=day) for day in days)
    server = serve(authority.server(host, begins, ends))
    with pytest.raises(SuperLinkError, match=words) as caught:
        diagnose(Connection("a", server.address, str(authority.file)))
    assert server.address in str(caught.value)


def test_another_authority(home: Path, authority: Authority, serve: type[Server]) -> None:
    server = serve(authority.server("127.0.0.1", NOW - timedelta(days=1), NOW + timedelta(days=1)))
    with pytest.raises(SuperLinkError, match=r"not trusted.*get the authority's ca.crt"):
        diagnose(Connection("a", server.address, str(Authority(home / "other").file)))
    with pytest.raises(SuperLinkError, match=r"not trusted.*the system"):
        diagnose(Connection("a", server.address))


def test_tls_asked_of_a_server_without(authority: Authority, serve: type[Server]) -> None:
    server = serve(None)
    assert diagnose(Connection("a", server.address, insecure=True)) is None
    with pytest.raises(SuperLinkError, match="does not speak TLS"):
        diagnose(Connection("a", server.address, str(authority.file)))


def test_a_server_with_tls_asked_without(authority: Authority, serve: type[Server]) -> None:
    server = serve(authority.server("127.0.0.1", NOW - timedelta(days=1), NOW + timedelta(days=1)))
    with pytest.raises(SuperLinkError, match=r"does not answer without TLS.*--root-certificates"):
        diagnose(Connection("a", server.address, insecure=True))


def test_nobody_there_and_no_such_name(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SuperLinkError, match=r"cannot be reached; got Connection refused.*not started"):
        diagnose(Connection("a", address, str(authority.file)))
    with pytest.raises(SuperLinkError, match="a name that nobody knows"):
        diagnose(Connection("a", "no-such-host.invalid:8000", str(authority.file)))


def test_no_root_certificates(home: Path) -> None:
    (home / "empty.crt").write_text("nothing\n")
    for file in ("none.crt", "empty.crt"):
        with pytest.raises(SuperLinkError, match="root certificates of SuperLink a cannot be read"):
            diagnose(Connection("a", "127.0.0.1:1", str(home / file)))
