"""The sketches of one calibration pass: in memory up to a limit, beyond it in a file without a name.

Whether a site's sketch counts is known only when all have come and their sizes can be compared, so none can go into a
sum before that. A thousand sites' sketches are read again then, one layer of one site at a time. The file lies in the
run's folder, where there is room for what a run needs; having no name, it cannot be opened by anybody else and is gone
with the process, however that ends.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import numpy as np

from giva_core import bases
from giva_core.calibration import Sketches
from giva_core.errors import StoreError
from giva_core.types import QuantisedSketch

#: Bytes of sketches that are kept in memory: those of 200 sites with MiniLM at r = 8, of one with OLMo2-7B at r = 64.
KEPT_SKETCH_BYTES = 2**28
_EXPONENT = np.dtype(np.int32)


class SketchShelf:
    """Sketches by site, each put there once and read a layer at a time.

    Args:
        folder: Where the file is made, if it is needed.
        shapes: Shape of a sketch by layer.
        kept_bytes: How much is kept in memory.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, int]], kept_bytes: int) -> None:
        self.shapes = shapes
        self._folder, self._room = folder, kept_bytes
        self._kept: dict[str, Sketches] = {}
        #: Where a site's sketches begin, in which file, and the type of the codes.
        self._written: dict[str, tuple[FileIO, int, np.dtype]] = {}
        self._file: FileIO | None = None
        self._end = 0
        sizes = [(0, 0), *((n * q, q) for n, q in shapes.values())]
        before = accumulate(sizes, lambda sums, size: (sums[0] + size[0], sums[1] + size[1]))
        self._before = dict(zip(shapes, before, strict=False))  # by layer: codes and exponents of the layers before it

    def __enter__(self) -> SketchShelf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    @property
    def written_bytes(self) -> int:
        """Bytes in the file."""
        return self._end

    def check_room(self, sites: int, bits: int) -> None:
        """Make sure of the disk before sites work for what cannot be stored.

        Args:
            sites: How many are asked.
            bits: Bits of a code, as they are asked for.

        Raises:
            StoreError: What goes into the file does not fit on the disk.
        """
        needed = sites * sketch_bytes(self.shapes, bits) - self._room
        if needed > 0 and needed > (free := shutil.disk_usage(self._folder).free):
            raise StoreError(
                f"the sketches of {sites} sites do not fit on the disk",
                got=f"{free:,} free bytes in {self._folder}",
                expected=f"{needed:,} until the sites are heard",
                remedy="free some room, put the store on a larger disk, or lower giva.rank or giva.oversampling",
            )

    def put(self, site: str, sketches: Sketches) -> None:
        """Put a site's sketches here.

        Raises:
            StoreError: The file cannot be written.
        """
        layers = [sketches[name] for name in self.shapes]
        size = sum(sketch.codes.nbytes + sketch.exponents.size * _EXPONENT.itemsize for sketch in layers)
        if size <= self._room:
            self._room -= size
            self._kept[site] = sketches
            return
        with self._guarded():
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - closed by __exit__
            self._file.seek(self._end)
            for sketch in layers:
                _write(self._file, sketch.codes)
                _write(self._file, sketch.exponents.astype(_EXPONENT, copy=False))
        self._written[site] = self._file, self._end, layers[0].codes.dtype
        self._end += size

    def layer(self, site: str, name: str) -> QuantisedSketch:
        """A site's sketch of one layer.

        Raises:
            StoreError: The file cannot be read.
        """
        if site in self._kept:
            return self._kept[site][name]
        file, start, code = self._written[site]
        codes, exponents = self._before[name]
        n, q = self.shapes[name]
        with self._guarded():
            file.seek(start + codes * code.itemsize + exponents * _EXPONENT.itemsize)
            return QuantisedSketch(_read(file, code, (n, q)), _read(file, _EXPONENT, (q,)))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                "the sites' sketches cannot be stored",
                got=error,
                cause=f"the disk is full, or {self._folder} cannot be written by this user",
                remedy="free some room, then resume the run; what was recorded before is intact",
            ) from error


def sketch_bytes(shapes: Mapping[str, tuple[int, int]], bits: int) -> int:
    """Bytes of one site's sketches, with codes of `bits` bits."""
    return sum(n * q * bases.code_type(bits).itemsize + q * _EXPONENT.itemsize for n, q in shapes.values())


def _write(file: FileIO, array: np.ndarray) -> None:
    rest = np.ascontiguousarray(array).data.cast("B")
    while len(rest):  # an unbuffered file may take a part
        rest = rest[file.write(rest) :]


def _read(file: FileIO, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, kind)
    rest = array.data.cast("B")
    while len(rest):
        if not (count := file.readinto(rest)):
            raise OSError("the file is shorter than what was written")
        rest = rest[count:]
    return array
