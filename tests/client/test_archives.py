"""Pinned archives: only the pinned bytes are used, and nothing is read or written outside their own folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client.archives import Archive, obtain, tar_files, zip_files
from giva_core.errors import DataError

CONTENT = b"the pinned bytes"
PINNED = Archive(
    "thing", "1.2", "thing-1.2-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest(), licence="MIT", content="things"
)


def silent(message: str) -> None:
    """No progress is shown."""


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Replaces pip: what it brings, its exit code and its output; gives back the commands it was called with."""

    def install(content: bytes | None, code: int = 0, output: str = "") -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            requirement = Path(command[command.index("--requirement") + 1]).read_text(encoding="utf-8")
            commands.append([*command, requirement])
            if content is not None:
                Path(command[command.index("--dest") + 1], PINNED.filename).write_bytes(content)
            return subprocess.CompletedProcess(command, code, output)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return install


def test_pip_brings_it_once_and_the_cache_serves_it_then(tmp_path: Path, pip: Callable[..., list[list[str]]]) -> None:
    commands = pip(CONTENT)
    told: list[str] = []
    for _ in range(2):
        assert obtain(PINNED, tmp_path / "cache", None, told.append).read_bytes() == CONTENT
    assert len(commands) == 1 and told == ["fetching thing 1.2 with pip"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(commands[0])
    assert commands[0][-1] == f"thing==1.2 --hash=sha256:{PINNED.sha256}\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [PINNED.filename]


def test_an_sdist_is_asked_for_as_such(tmp_path: Path, pip: Callable[..., list[list[str]]]) -> None:
    commands = pip(CONTENT)
    obtain(replace(PINNED, filename="thing-1.2.tar.gz"), tmp_path, None, silent)
    assert "--no-binary" in commands[0] and "--only-binary" not in commands[0]


def test_other_bytes_are_refused_wherever_they_come_from(tmp_path: Path, pip: Callable[..., list[list[str]]]) -> None:
    pip(b"other bytes")
    with pytest.raises(DataError, match=rf"not the pinned thing 1\.2; .* expected {PINNED.sha256}.*pip config"):
        obtain(PINNED, tmp_path, None, silent)
    assert not (tmp_path / PINNED.filename).exists()
    (tmp_path / PINNED.filename).write_bytes(b"other bytes")
    with pytest.raises(DataError, match="Remedy: delete"):
        obtain(PINNED, tmp_path, None, silent)
    with pytest.raises(DataError, match="Remedy: fetch the file again"):
        obtain(PINNED, tmp_path / "cache", tmp_path, silent)


def test_pip_fails(tmp_path: Path, pip: Callable[..., list[list[str]]]) -> None:
    pip(None, code=1, output="\n".join(f"line {i}" for i in range(30)) + "\nERROR: no matching distribution\n")
    with pytest.raises(DataError) as caught:
        obtain(PINNED, tmp_path, None, silent)
    text = str(caught.value)
    assert "ERROR: no matching distribution" in text and "line 29" in text and "line 9\n" not in text
    assert "exit code 1" in text and "--archives" in text
    assert list(tmp_path.iterdir()) == []


def test_offline_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not in the folder of archives.*pip download --no-deps thing==1\.2"):
        obtain(PINNED, tmp_path / "cache", tmp_path, silent)
    (tmp_path / PINNED.filename).write_bytes(CONTENT)
    assert obtain(PINNED, tmp_path / "cache", tmp_path, silent) == tmp_path / PINNED.filename
    assert not (tmp_path / "cache").exists()


def make_zip(path: Path, names: tuple[str, ...]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"content of {name}")
    return path


def make_tar(members: list[tarfile.TarInfo]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for member in members:
            content = member.name.encode() if member.isreg() else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def test_zip_files_below_a_prefix_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", ("p/b/c.txt", "p/a.txt", "q.txt", "p/empty/"))
    assert list(zip_files(path, "p/")) == [("a.txt", b"content of p/a.txt"), ("b/c.txt", b"content of p/b/c.txt")]


@pytest.mark.parametrize("name", ["../evil", "p/../../evil", "/etc/evil", "p\\..\\evil"])
def test_entries_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="points out of its own folder"):
        list(zip_files(make_zip(tmp_path / "a.zip", ("p/a.txt", name)), "p/"))
    with pytest.raises(DataError, match="points out of its own folder"):
        tar_files(make_tar([tarfile.TarInfo("p/a.txt"), tarfile.TarInfo(name)]), ("p/a.txt",))


def test_tar_files_by_name_from_a_file_or_its_bytes(tmp_path: Path) -> None:
    content = make_tar([tarfile.TarInfo(name) for name in ("p/a", "p/b", "p/c")])
    (tmp_path / "a.tar.gz").write_bytes(content)
    for source in (content, tmp_path / "a.tar.gz"):
        assert tar_files(source, ("p/a", "p/c")) == {"p/a": b"p/a", "p/c": b"p/c"}


def test_a_link_or_a_hole_in_the_place_of_a_file_is_refused() -> None:
    link = tarfile.TarInfo("p/a")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(DataError, match=r"lacks files; got 0 of 2; expected p/a, p/b"):
        tar_files(make_tar([link]), ("p/a", "p/b"))


def test_damaged_archives(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="is not a readable archive"):
        list(zip_files(tmp_path / "a.zip", ""))
    for content in (b"no tar", gzip.compress(b"no tar"), make_tar([tarfile.TarInfo("p/a")])[:-20]):
        with pytest.raises(DataError, match="is not a readable archive"):
            tar_files(content, ("p/a",))
