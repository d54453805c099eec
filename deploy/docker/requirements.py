"""Print what pip has to install for one image, from pyproject.toml: its dependencies, those of extras, or flwr alone.

python requirements.py flwr|base|EXTRA... < pyproject.toml

An extra that names another of this project's is written out: pip would look for the project in its index.

A change of pyproject.toml that touches no dependency then leaves the images' large layers as they are.
"""

from __future__ import annotations

import re
import sys
import tomllib

project = tomllib.load(sys.stdin.buffer)["project"]
extras = project["optional-dependencies"]


def lines_of(extra: str) -> set[str]:
    """The requirements of an extra."""
    if extra not in extras:
        sys.exit(f"requirements.py: there is no extra {extra!r}, only {', '.join(extras)}")
    lines: set[str] = set()
    for line in extras[extra]:
        own = re.fullmatch(rf"{project['name']}\[(.+)\]", line)
        lines |= lines_of_all(own.group(1).split(",")) if own else {line}
    return lines


def lines_of_all(names: list[str]) -> set[str]:
    """Those of several."""
    return {line for name in names for line in lines_of(name.strip())}


lines = set(project["dependencies"])
if sys.argv[1:] == ["flwr"]:
    lines = {line for line in lines if re.match(r"flwr\b", line)}
elif sys.argv[1:] != ["base"]:
    lines |= lines_of_all(sys.argv[1:])
print("\n".join(sorted(lines)))
