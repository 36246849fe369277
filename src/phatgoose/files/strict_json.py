"""JSON files of bounded size and depth, read strictly."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import ExpertError, PhatgooseError
from .quoting import one_line, reason
from .regular_file import regular_file, require_regular

__all__ = ["MOST_JSON_BYTES", "distinct_keys", "parse_file", "read_json_object"]

MOST_JSON_BYTES = 16 * 2**20
MOST_NESTED = 100  # lists and objects inside each other; copying and writing recurse too


def read_json_object(path: Path, error: type[PhatgooseError] = ExpertError) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Strict: UTF-8, no duplicate keys, no NaN or infinity, at most MOST_JSON_BYTES and MOST_NESTED
    levels. Raises FileNotFoundError when there is no such file, `error` for anything else that is
    wrong.
    """
    regular_file(path, error)
    content = parse_file(path, str(path), "JSON", MOST_JSON_BYTES, _parse, error)
    if not isinstance(content, dict):
        raise error(f"{path} is not valid JSON for this: wanted an object, {{...}}.")
    return content


def parse_file(
    path: Path,
    label: str,
    kind: str,
    most: int,
    parse: Callable[[str], Any],
    error: type[PhatgooseError],
) -> Any:
    """What `parse` makes of the text in `path`, of at most `most` bytes and MOST_NESTED levels.

    `label` and `kind` are what messages call the file and its format. Raises FileNotFoundError when
    there is no such file, `error` for anything else that is wrong.
    """
    try:
        size = require_regular(path, error, label)
        if size > most:
            raise error(f"{label} has {size} bytes; at most {most} are read.")
        content = parse(path.read_text(encoding="utf-8"))
        if _nested(content) > MOST_NESTED:
            raise RecursionError
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{label} can't be read: {reason(problem)}.") from problem
    except RecursionError as problem:
        raise error(f"{label} is not valid {kind}: it is nested too deeply.") from problem
    except ValueError as problem:
        raise error(f"{label} is not valid {kind}: {one_line(problem)}.") from problem
    return content


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`, for json's object_pairs_hook. Raises ValueError for a repeated key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {times.most_common(1)[0][0]!r} appears twice in one object")
    return found


def _parse(text: str) -> Any:
    return json.loads(
        text,
        object_pairs_hook=distinct_keys,
        parse_constant=_no_constant,
        parse_float=_finite,
    )


def _nested(content: Any) -> int:
    """How many levels of lists and objects `content` has, counted up to MOST_NESTED + 1."""
    level, depth = [content], 0
    while depth <= MOST_NESTED:
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            break
        depth += 1
        level = [inner for each in level for inner in _parts(each)]
    return depth


def _parts(content: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return content.values() if isinstance(content, dict) else content


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
