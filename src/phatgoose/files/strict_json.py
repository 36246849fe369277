"""Reading what strangers wrote: regular files of bounded size, each inside its own folder.

An expert may come from anywhere. Nothing outside its folder is read on its behalf: a symbolic link
must stay in the folder (in a Hub cache it may lead from a snapshot to the blobs of the same
repository, which is how huggingface_hub keeps files). JSON is read strictly.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import ExpertError, PhatgooseError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "MOST_JSON_BYTES",
    "one_line",
    "read_json_object",
    "read_toml",
    "regular_file",
    "sha256_of",
    "shortened",
    "unlike_keys",
]

MOST_JSON_BYTES = 16 * 2**20
MOST_TOML_BYTES = 2**20  # its parser is slower
MOST_DOTS = 1000  # in a line of TOML, whose parser takes the square of a dotted key's length
MOST_NESTED = 100  # lists and objects one within the other; copying and writing go down too
HASHED_AT_ONCE = 2**20


def regular_file(path: Path, error: type[PhatgooseError] = ExpertError) -> Path:
    """`path`, known to be a regular file that lies in its own folder.

    Raises FileNotFoundError when there is none, `error` when it is something else (a folder, a
    pipe, a device) or a symbolic link that leads out of the folder.
    """
    try:
        mode, place, folder = path.stat().st_mode, path.resolve(), path.parent.resolve()
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as problem:  # a loop of links, a name with a NUL
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path} can't be read: {reason}.") from problem
    if not stat.S_ISREG(mode):
        raise error(f"{path} is no regular file.")
    if not any(place.is_relative_to(known) for known in (folder, *_blobs_of(folder))):
        raise error(f"{path} is a symbolic link that leads out of its folder; copy the file there.")
    return path


def read_json_object(path: Path, error: type[PhatgooseError] = ExpertError) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Strict: UTF-8, no key twice in one object, no NaN or infinity, at most MOST_JSON_BYTES and
    MOST_NESTED levels. Raises FileNotFoundError when there is no such file, `error` for anything
    else that is wrong.
    """
    regular_file(path, error)
    content = _parsed(path, str(path), "JSON", MOST_JSON_BYTES, _strict_json, error)
    if not isinstance(content, dict):
        raise error(f"{path} is not valid JSON for this: wanted an object, {{...}}.")
    return content


def read_toml(path: Path, what: str, error: type[PhatgooseError]) -> dict[str, Any]:
    """The table in the TOML file `path`, which is a `what`, such as "Recipe".

    Raises `error` when there is none, it is no TOML, or it is larger than MOST_TOML_BYTES or nested
    deeper than MOST_NESTED.
    """
    label = f"{what} {path}"
    try:
        return dict(_parsed(path, label, "TOML", MOST_TOML_BYTES, _tame_toml, error))
    except FileNotFoundError as problem:
        raise error(f"{label} can't be read: {problem.strerror}.") from problem


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises ExpertError when it can't be read."""
    digest = hashlib.sha256()
    try:
        with regular_file(path).open("rb") as file:
            while part := file.read(HASHED_AT_ONCE):
                digest.update(part)
        return digest.hexdigest()
    except OSError as error:
        raise ExpertError(f"{path} can't be read: {error.strerror}.") from error


def unlike_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`, for json's object_pairs_hook. Raises ValueError for a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key in times if times[key] > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def shortened(value: object, most: int = 80) -> str:
    """`value` as Python writes it, cut to `most` characters and one line, for error messages."""
    return one_line(repr(value), most)


def one_line(text: object, most: int = 300) -> str:
    """`text`, an error of another library say, as one printable line of at most `most` characters.

    What others raise may hold names out of the files that they failed to read.
    """
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= most else f"{line[:most]}…"


def _parsed(
    path: Path,
    label: str,
    kind: str,
    most: int,
    parse: Callable[[str], Any],
    error: type[PhatgooseError],
) -> Any:
    """What `parse` makes of the text in `path`, called `label`. Raises as `read_json_object`."""
    try:
        size = path.stat().st_size
        if size > most:
            raise error(f"{label} has {size} bytes; at most {most} are read of such a file.")
        content = parse(path.read_text(encoding="utf-8"))
        if _nested(content) > MOST_NESTED:
            raise RecursionError
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{label} can't be read: {problem.strerror}.") from problem
    except RecursionError as problem:
        raise error(f"{label} is not valid {kind}: it is nested too deeply.") from problem
    except ValueError as problem:
        raise error(f"{label} is not valid {kind}: {one_line(problem)}.") from problem
    return content


def _strict_json(text: str) -> Any:
    return json.loads(
        text,
        object_pairs_hook=unlike_keys,
        parse_constant=_no_constant,
        parse_float=_finite,
    )


def _tame_toml(text: str) -> Any:
    if max(line.count(".") for line in text.split("\n")) > MOST_DOTS:
        raise RecursionError
    return tomllib.loads(text)


def _nested(content: Any) -> int:
    """How many lists and objects of `content` stand one within the other; MOST_NESTED + 1 is all
    that is counted.
    """
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


def _blobs_of(folder: Path) -> tuple[Path, ...]:
    """Where huggingface_hub keeps the files of a cached snapshot, if `folder` is in one."""
    for above in (folder, *folder.parents):
        if above.parent.name == "snapshots" and above.parent.parent.name.startswith("models--"):
            return (above.parent.parent / "blobs",)
    return ()


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
