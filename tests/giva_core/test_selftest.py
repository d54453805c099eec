"""The same digest under other BLAS kernels, thread counts and SIMD levels, each in a process of its own.

Equal digests prove something only if the variants really compute differently, so each kind of variant comes with a
control that must change: LAPACK's float64 bits for BLAS kernels, numpy's own transcendental functions for SIMD levels.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from giva_core import selftest

PROBE = """
import hashlib, json
import numpy as np
from giva_core import selftest
x = np.linspace(0.1, 3.0, 10007)
control = hashlib.sha256(np.exp(x).tobytes() + np.sin(x).tobytes() + np.exp(x.astype("f4")).tobytes()).hexdigest()
found = selftest.run()
print(json.dumps({"digest": found.digest, "lapack": found.lapack_digest, "simd": control}))
"""

x86_openblas = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or "openblas" not in selftest.run().blas,
    reason="kernels are chosen by OpenBLAS's variables, by their x86 names",
)
SIMD = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])


def probe(**variables: str) -> dict[str, str]:
    """Run the self-test in a new process with these environment variables."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "ignore", "-c", PROBE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_this_machine_passes() -> None:
    found = selftest.run()
    assert found.digest == found.expected == selftest.EXPECTED_DIGEST
    assert found.passed
    assert found.numpy_version == np.__version__
    assert found.blas and found.machine


def test_another_digest_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_SEED", selftest._SEED + 1)
    found = selftest.run()
    assert not found.passed and found.digest != found.expected


@x86_openblas
def test_blas_kernels_and_threads_change_lapack_but_not_the_bases() -> None:
    found = [
        probe(OPENBLAS_CORETYPE=kernel, OPENBLAS_NUM_THREADS=threads)
        for kernel, threads in (("Haswell", "1"), ("Nehalem", "2"), ("Prescott", "1"))
    ]
    assert len({each["lapack"] for each in found}) > 1, "the kernels did not change; this test shows nothing"
    assert {each["digest"] for each in found} == {selftest.EXPECTED_DIGEST}


@pytest.mark.skipif(len(SIMD) < 2, reason="numpy found no SIMD level to switch off")
def test_simd_levels_change_numpys_functions_but_not_the_bases() -> None:
    found = [probe(), probe(NPY_DISABLE_CPU_FEATURES=" ".join(SIMD))]
    assert len({each["simd"] for each in found}) > 1, "the SIMD level did not change; this test shows nothing"
    assert {each["digest"] for each in found} == {selftest.EXPECTED_DIGEST}
