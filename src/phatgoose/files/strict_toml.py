"""TOML files of bounded size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import PhatgooseError
from .quoting import reason
from .strict_json import parse_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["read_toml"]

MOST_TOML_BYTES = 2**20  # less than of JSON: the parser is slower
MOST_DOTS = 1000  # in a line: the parser's time grows with the square of a dotted key's length


def read_toml(path: Path, what: str, error: type[PhatgooseError]) -> dict[str, Any]:
    """The table in the TOML file `path`, which messages call a `what`, such as "Recipe".

    Raises `error` when there is no such file, or it is not TOML, larger than MOST_TOML_BYTES or
    nested deeper than MOST_NESTED levels.
    """
    label = f"{what} {path}"
    try:
        return dict(parse_file(path, label, "TOML", MOST_TOML_BYTES, _parse, error))
    except FileNotFoundError as problem:
        raise error(f"{label} can't be read: {reason(problem)}.") from problem


def _parse(text: str) -> Any:
    if max(line.count(".") for line in text.split("\n")) > MOST_DOTS:
        raise RecursionError
    return tomllib.loads(text)
