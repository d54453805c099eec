"""The medical demo, which several benchmarks run: its recipe, its model and its questions."""

from __future__ import annotations

import sys
from pathlib import Path

from client.prepare import prepare
from client.prepared import Prepared
from giva_core.paths import giva_home

RECIPE = Path(__file__).parent.parent / "recipes" / "medical.toml"


def medical(seed: int = 0) -> Prepared:
    """The model, and the questions split by this seed; both are made where they are missing."""
    return prepare("medical", home=giva_home(), seed=seed, progress=lambda text: print(text, file=sys.stderr))
