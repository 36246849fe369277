"""The lowest version of each package that pyproject.toml allows, as constraints for pip.

    python .ci/lowest_versions.py > lowest.txt
    pip install --constraint lowest.txt -e .

They are those of the core and of what users install beside it; what only contributors need (EXTRAS)
may be as new as it likes.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = {"dev", "docs", "test"}
BOUND = re.compile(r"(?P<name>[\w.-]+)(\[[^]]*\])?[>=]=(?P<lowest>[\w.]+)(,[^;]*)?(?P<marker>;.*)?")


def lowest_versions(project: dict[str, Any]) -> Iterator[str]:
    """The constraints, one a line; each requirement must begin with its lower bound."""
    extras = project["optional-dependencies"]
    users = [extras[extra] for extra in sorted(extras.keys() - EXTRAS)]
    for requirement in [*project["dependencies"], *(text for each in users for text in each)]:
        found = BOUND.fullmatch(requirement)
        if found is None:
            sys.exit(f"{PROJECT}: {requirement!r} must begin with NAME>=VERSION, or NAME==VERSION.")
        yield f"{found['name']}=={found['lowest']}{found['marker'] or ''}"


if __name__ == "__main__":
    content = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    sys.stdout.writelines(f"{line}\n" for line in lowest_versions(content["project"]))
