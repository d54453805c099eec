"""deploy/make-certificates.sh: what it makes works, what is good it keeps, what is private nobody else can read."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from live_federation import ROOT, need

from server.approved import fingerprint

pytestmark = pytest.mark.deploy

SCRIPT = ROOT / "deploy" / "make-certificates.sh"


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("openssl", "ssh-keygen")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def make(*arguments: object) -> list[str]:
    """The files that were made, and not kept."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("made ")]
    return [name.strip(",") for line in lines for name in line.partition(" for ")[0].split()[1:]]


def names(certificate: Path) -> set[str]:
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in extension}


def test_everything_is_made_and_private_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    made = make(folder, "--host", "superlink.example.org", "--host", "10.0.0.5", "--site", "a", "--site", "b.c")
    assert set(made) == {path.name for path in folder.iterdir()}
    expected = {
        "ca.crt",
        "ca.key",
        "server.crt",
        "server.key",
        "superexec.secret",
        "a.key",
        "a.pub",
        "b.c.key",
        "b.c.pub",
    }
    assert set(made) == expected
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o777 == (0o644 if file.suffix in (".crt", ".pub") else 0o600), file.name
    assert names(folder / "server.crt") == {"localhost", "127.0.0.1", "::1", "superlink.example.org", "10.0.0.5"}
    assert len((folder / "superexec.secret").read_bytes()) == 32


def test_a_client_that_knows_the_authority_trusts_the_server(tmp_path: Path) -> None:
    make(tmp_path, "--host", "superlink.example.org")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    client = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname="superlink.example.org"),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    done: set[int] = set()
    for _ in range(10):
        for number, end in enumerate(ends):
            try:
                end.do_handshake()
                done.add(number)
            except ssl.SSLWantReadError:
                continue
    assert done == {0, 1} and ends[0].version() == "TLSv1.3"


def test_a_site_s_keys_are_a_pair_that_flower_takes(tmp_path: Path) -> None:
    make(tmp_path, "--site", "a")
    private = serialization.load_ssh_private_key((tmp_path / "a.key").read_bytes(), None)
    public = (tmp_path / "a.pub").read_text()
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert public.startswith("ecdsa-sha2-nistp384 ") and public.endswith(" a\n")
    assert private.public_key().public_bytes(*form).decode() == public.rpartition(" ")[0]
    shown = subprocess.run(["ssh-keygen", "-lf", tmp_path / "a.pub"], capture_output=True, text=True, check=True).stdout
    assert fingerprint(tmp_path / "a.pub") in shown


def test_what_is_good_is_kept(tmp_path: Path) -> None:
    make(tmp_path, "--host", "one.example.org", "--site", "a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert make(tmp_path, "--host", "one.example.org", "--site", "a") == []
    assert make(tmp_path) == []  # it names more than is asked for
    assert make(tmp_path, "--site", "b") == ["b.key", "b.pub"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("change", ["another host", "ends soon", "renew", "other key"])
def test_the_server_s_certificate_is_renewed_when_it_has_to_be(tmp_path: Path, change: str) -> None:
    make(tmp_path, "--host", "one.example.org", "--days", 20 if change == "ends soon" else 397)
    authority, certificate = (tmp_path / "ca.crt").read_bytes(), (tmp_path / "server.crt").read_bytes()
    arguments: tuple[object, ...] = ("--host", "one.example.org")
    if change == "another host":
        arguments = ("--host", "two.example.org")
    if change == "renew":
        arguments = (*arguments, "--renew")
    if change == "other key":
        make(tmp_path / "other")
        (tmp_path / "server.key").write_bytes((tmp_path / "other" / "server.key").read_bytes())
    assert make(tmp_path, *arguments) == ["server.crt", "server.key"]
    assert (tmp_path / "ca.crt").read_bytes() == authority
    assert (tmp_path / "server.crt").read_bytes() != certificate
    assert make(tmp_path, *arguments[:2]) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name the folder"),
        (("{}", "more"), "one folder, not two"),
        (("{}", "--host"), "--host needs a value"),
        (("{}", "--host", "a b"), "--host takes one word"),
        (("{}", "--host", "$(id)"), "neither a host name nor an address"),
        (("{}", "--site", "../a"), "cannot be a site's name"),
        (("{}", "--site", "server"), "what another file here is called"),
        (("{}", "--days", "soon"), "a whole number, not 'soon'"),
        (("{}", "--colour", "red"), "there is no option --colour"),
    ],
)
def test_wrong_usage_is_told_and_makes_nothing(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    folder = tmp_path / "keys"
    done = run(*(str(folder) if argument == "{}" else argument for argument in arguments))
    assert done.returncode == 2 and words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_half_an_authority_is_not_completed(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "ca.key").unlink()
    done = run(tmp_path)
    assert done.returncode == 2 and "only one of ca.key and ca.crt" in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_help_says_what_the_options_are() -> None:
    done = run("--help")
    assert done.returncode == 0
    for option in ("--host", "--site", "--days", "--renew"):
        assert f"  {option}" in done.stdout
