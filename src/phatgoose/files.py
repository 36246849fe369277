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
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import ExpertError, PhatgooseError

__all__ = [
    "MOST_JSON_BYTES",
    "one_line",
    "read_json_object",
    "regular_file",
    "sha256_of",
    "shortened",
    "unlike_keys",
]

MOST_JSON_BYTES = 16 * 2**20
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

    Strict: UTF-8, no key twice in one object, no NaN or infinity, at most MOST_JSON_BYTES. Raises
    FileNotFoundError when there is no such file, `error` for anything else that is wrong.
    """
    regular_file(path, error)
    try:
        size = path.stat().st_size
        if size > MOST_JSON_BYTES:
            raise error(
                f"{path} has {size} bytes; at most {MOST_JSON_BYTES} are read of such a file."
            )
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=unlike_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except OSError as problem:
        raise error(f"{path} can't be read: {problem.strerror}.") from problem
    except RecursionError as problem:
        raise error(f"{path} is not valid JSON: it is nested too deeply.") from problem
    except ValueError as problem:
        raise error(f"{path} is not valid JSON: {one_line(problem)}.") from problem
    if not isinstance(content, dict):
        raise error(f"{path} is not valid JSON for this: wanted an object, {{...}}.")
    return content


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
