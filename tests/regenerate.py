"""Write what is derived from the code anew: the app's tables in pyproject.toml, and docs/configuration.md.

python tests/regenerate.py
"""

from __future__ import annotations

import re
from pathlib import Path

from test_architecture import render_defaults
from test_docs import SITE_TABLE, render_settings, render_site

PROJECT = Path(__file__).parents[1]


def main() -> None:
    """Replace both in place."""
    path = PROJECT / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    block = re.compile(r"\[tool\.flwr\.app\.config\]\n.*?(?=\n# ---|\n\[tool\.(?!flwr\.app\.config))", re.DOTALL)
    path.write_text(block.sub(lambda _: render_defaults().rstrip("\n") + "\n", text, count=1), encoding="utf-8")
    path = PROJECT / "docs" / "configuration.md"
    intro = path.read_text(encoding="utf-8").partition(SITE_TABLE)[0]
    path.write_text(intro + render_site() + "\n" + render_settings(), encoding="utf-8")


if __name__ == "__main__":
    main()
