"""Print what pip has to install for one image, from pyproject.toml: its dependencies, those of an extra, or flwr alone.

python requirements.py flwr|base|EXTRA < pyproject.toml

A change of pyproject.toml that touches no dependency then leaves the images' large layers as they are.
"""

from __future__ import annotations

import re
import sys
import tomllib

project = tomllib.load(sys.stdin.buffer)["project"]
wanted = sys.argv[1]
lines = list(project["dependencies"])
if wanted == "flwr":
    lines = [line for line in lines if re.match(r"flwr\b", line)]
elif wanted != "base":
    lines += project["optional-dependencies"][wanted]
print("\n".join(sorted(lines)))
