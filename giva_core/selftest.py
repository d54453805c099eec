"""Does this machine build the same bases as every other? One digest, shipped below, settles it.

The built-in sketches pass through everything that a run's bases pass through: Philox, rounding, the exact Gram matrix,
Jacobi, Cholesky QR, all four initialisations, a weighted mean and a range basis. For comparison the same sketches also
go through LAPACK, whose digest is expected to differ from machine to machine.

Both digests cover float64 bits. Rounding to float32 hides most differences in the last bits, so that equal float32
bases alone would not show that the steps behind them are exact: other sketches would round the other way.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass

import numpy as np

from . import bases, exact
from .config import INITS, GivaConfig
from .types import LayerShape, QuantisedSketch

#: Digest of the built-in bases. It changes only together with the algorithm, and then runs cannot be resumed across it.
EXPECTED_DIGEST = "6a372a06f29fd1fe20c39503330c3b162774a9adf0d3eafdc3ae927e9a5992a9"

_SEED = 20
_RANK = 8
_WIDTH = 24
_LAYERS = (
    LayerShape("wide", 48, 1024),
    LayerShape("tall", 1000, 96),
    LayerShape("odd", 77, 333),
    LayerShape("small", 31, 25),
)


@dataclass(frozen=True)
class SelfTest:
    """What the self-test found.

    Attributes:
        digest: SHA-256 of the bases built here.
        expected: SHA-256 that every machine must find.
        passed: Whether the two are equal.
        lapack_digest: SHA-256 of the same factors made with `numpy.linalg` in float64; it has no right value.
        numpy_version: numpy's version.
        blas: Name and version of the BLAS that numpy was built with.
        machine: CPU architecture and operating system.
    """

    digest: str
    expected: str
    passed: bool
    lapack_digest: str
    numpy_version: str
    blas: str
    machine: str


def run() -> SelfTest:
    """Build the built-in bases and compare; takes well under two seconds."""
    sketches = {layer.name: _sketch(f"Y/{layer.name}", layer.d_in, _WIDTH) for layer in _LAYERS}
    digest = hashlib.sha256()
    for init in INITS:
        digest.update(_built(sketches, init).encode())
    for layer in _LAYERS:
        sketch = sketches[layer.name]
        factor = exact.orthonormalise(sketch.codes, sketch.exponents)
        frame = exact.gram_schmidt(*exact.quantise(_draw(layer), 20))
        [start] = bases.range_bases([layer], [sketch])
        for array in (factor.Q, factor.singular_values, factor.right, frame, start):
            digest.update(array.astype("<f8").tobytes())
    found = digest.hexdigest()
    return SelfTest(
        digest=found,
        expected=EXPECTED_DIGEST,
        passed=found == EXPECTED_DIGEST,
        lapack_digest=_lapack_digest(sketches),
        numpy_version=np.__version__,
        blas=_blas(),
        machine=f"{platform.machine()} {platform.system()}",
    )


def _built(sketches: dict[str, QuantisedSketch], init: str) -> str:
    config = GivaConfig(rank=_RANK, init=init, seed=_SEED)
    ranks = [layer.effective_rank(_RANK, init) for layer in _LAYERS]
    coordinates = {
        layer.name: _sketch(f"Z/{layer.name}", layer.d_out, bases.coordinate_rank(config, layer, r))
        for layer, r in zip(_LAYERS, ranks, strict=True)
    }
    return bases.build_bases(_LAYERS, ranks, sketches, config, coordinates).digest


def _sketch(stream: str, n: int, q: int) -> QuantisedSketch:
    """The mean of two sites' sketches; their columns have a common part and shrink by powers of two."""
    sites = []
    for site, bits in enumerate((16, 12)):
        draw = exact.uniform(_SEED, f"{stream}/{site}", (n, q)).astype(np.float64)
        common = exact.uniform(_SEED, f"{stream}/common", (n, 1)).astype(np.float64)
        sites.append(bases.quantise(np.ldexp(draw + common, -(np.arange(q) // 3)), bits))
    return bases.mean_sketch(sites, [3, 5], 16)


def _draw(layer: LayerShape) -> np.ndarray:
    return exact.uniform(_SEED, f"frame/{layer.name}", (layer.d_out, _RANK))


def _lapack_digest(sketches: dict[str, QuantisedSketch]) -> str:
    digest = hashlib.sha256()
    for layer in _LAYERS:
        U, S, Vh = np.linalg.svd(bases.dequantise(sketches[layer.name]), full_matrices=False)
        Q, _ = np.linalg.qr(_draw(layer).astype(np.float64))
        for array in (U, S, Vh, Q):
            digest.update(array.astype("<f8").tobytes())
    return digest.hexdigest()


def _blas() -> str:
    facts = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return f"{facts.get('name', 'unknown')} {facts.get('version', '')}".strip()
