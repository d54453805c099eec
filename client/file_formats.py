"""Files of rows: JSON Lines, CSV, Parquet, and folders of images.

Each row comes as columns, or as the kind of the fault that spoils it.
"""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from giva_core.errors import DataError, DependencyError

#: How many of the columns found an error names.
SHOWN_COLUMNS = 20

#: What an error says to look at where columns are missing, unless it knows better.
SETTINGS = "the columns under [data]"

_PARQUET_ROWS = 16  # held in memory at once: images are large
#: Endings of the files in a folder of images.
IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_UTF8_BOM = b"\xef\xbb\xbf"

#: The line on which a row starts, and the row by column, or the kind of the fault that makes it unreadable.
FoundRow = tuple[int, Mapping[str, Any] | str]


def open_rows(
    path: Path,
    needed: list[str],
    settings: str = SETTINGS,
    optional: Sequence[str] = (),
    image_columns: tuple[str, str] | None = None,
) -> Iterator[FoundRow]:
    """The rows of a file, one by one; its ending tells the format. Opening it may fail at the first row.

    Args:
        path: The file.
        needed: Columns that have to be there, where the format knows columns.
        settings: The settings that name them.
        optional: Columns that are read where they are there.
        image_columns: What the image and the label of a file in a folder of images are called; None where rows are
            not images.

    Raises:
        DataError: The format is not known, or the file is not of it.
        DependencyError: Parquet is asked for and pyarrow is not installed.
        OSError: There is no such file.
    """
    if image_columns and path.is_dir():
        return _read_images(path, *image_columns)
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path)
        case ".csv":
            return _read_csv(path, needed, settings)
        case ".parquet":
            return _read_parquet(path, needed, settings, optional)
        case "" if not path.exists():  # a folder of images, where it is there
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        case ending:
            raise DataError(
                f"{path} is in no known format",
                got=f"the ending '{ending}'",
                expected=".jsonl, .csv or .parquet",
                remedy="convert the file, or correct data.train-file / data.eval-file",
                public="the data file's format is not known",
            )


def _read_jsonl(path: Path) -> Iterator[FoundRow]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(_UTF8_BOM) if number == 1 else line
            if line.strip():
                yield number, _parse_json(line)


def _parse_json(line: bytes) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "row unreadable"
    return row if isinstance(row, dict) else "row unreadable"


def _read_csv(path: Path, needed: list[str], settings: str) -> Iterator[FoundRow]:
    with path.open("rb") as stream:
        # Bytes that are not UTF-8 pass as surrogates: they spoil their own row only, and never the count of the lines.
        lines = (
            (line.removeprefix(_UTF8_BOM) if number == 0 else line).decode("utf-8", errors="surrogateescape")
            for number, line in enumerate(stream)
        )
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:  # a quote that is not closed or is followed by text, or a cell beyond csv's size limit
                cells = None
            if cells == []:
                continue
            if not header:
                header = _csv_header(path, cells, needed, settings)
            elif cells is None or len(cells) != len(header):
                yield start, "row unreadable"
            elif not is_utf8("".join(cells)):
                yield start, "not UTF-8"
            else:
                yield start, dict(zip(header, cells, strict=True))


def _csv_header(path: Path, cells: list[str] | None, needed: list[str], settings: str) -> list[str]:
    if cells is None or not is_utf8("".join(cells)):
        raise DataError(
            f"{path} has no readable header",
            expected="the names of the columns, as comma-separated UTF-8",
            remedy="save the file as 'CSV UTF-8'",
            public="the data file has no readable header",
        )
    header = [cell.strip() for cell in cells]
    require_columns(path, needed, dict.fromkeys(header), settings)
    _require_distinct(path, needed, header)
    return header


def _read_parquet(path: Path, needed: list[str], settings: str, optional: Sequence[str]) -> Iterator[FoundRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DependencyError(
            "reading Parquet needs pyarrow, which is not installed",
            remedy="pip install 'fedgiva[parquet]'",
            public="the site cannot read Parquet",
        ) from None
    with path.open("rb") as stream:
        try:
            with parquet.ParquetFile(stream) as file:
                require_columns(path, needed, dict.fromkeys(file.schema_arrow.names), settings)
                _require_distinct(path, needed, file.schema_arrow.names)
                read = [*needed, *(column for column in optional if column in file.schema_arrow.names)]
                rows = (row for batch in file.iter_batches(_PARQUET_ROWS, columns=read) for row in batch.to_pylist())
                yield from enumerate(rows, start=1)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError):  # their texts may quote the file
            raise DataError(
                f"{path} is not a readable Parquet file",
                cause="the file is of another format, cut off, or its text is not UTF-8",
                remedy="write it again",
                public="the data file is not readable Parquet",
            ) from None


def _read_images(path: Path, image: str, label: str) -> Iterator[FoundRow]:
    """The files of `path/LABEL/`, by label and name; hidden ones are none."""
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = (file for folder in folders for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    for number, file in enumerate(files, start=1):
        is_image = file.is_file() and file.suffix.lower() in IMAGE_ENDINGS
        yield number, {image: file.read_bytes(), label: file.parent.name} if is_image else "not an image"


def require_columns(path: Path, needed: list[str], found: Mapping[str, None], settings: str = SETTINGS) -> None:
    """Refuse a file that lacks a needed column.

    Raises:
        DataError: Naming the columns that are missing, and some of those found.
    """
    missing = [column for column in needed if column not in found]
    if missing:
        names = " and ".join(f"'{column}'" for column in missing)
        raise DataError(
            f"{path} has no column {names}",
            got=f"the columns {', '.join(map(repr, list(found)[:SHOWN_COLUMNS]))}",
            remedy=f"rename the column, or set {settings}",
            public="the data file lacks a column",
        )


def _require_distinct(path: Path, needed: list[str], header: list[str]) -> None:
    for column in needed:
        if header.count(column) > 1:
            raise DataError(
                f"{path} has the column '{column}' {header.count(column)} times",
                expected="once",
                remedy="rename the others",
                public="the data file has a column more than once",
            )


def is_utf8(text: str) -> bool:
    """Whether a text read by another decoder can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
