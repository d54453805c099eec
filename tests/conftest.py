"""Settings that all tests and the processes they start share; they have to stand before torch or flwr is imported."""

from __future__ import annotations

import os
import tempfile

# Nothing a test writes may end in, nor depend on, the folders of the person who runs it.
_HOME = tempfile.TemporaryDirectory(prefix="giva-tests-")
os.environ["GIVA_HOME"] = os.path.join(_HOME.name, "giva")
os.environ["FLWR_HOME"] = os.path.join(_HOME.name, "flwr")

# Toy shapes gain nothing from threads, and several sites share one machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No test asks the network for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
