"""Files of others, read strictly: JSON, TOML, regular files only, and what is quoted of them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..errors import ExpertError, PhatgooseError


def one_line(text: object, most: int = 300) -> str:
    """`text` as one printable line of at most `most` characters: untrusted names may be in it."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= most else f"{line[:most]}…"


def shortened(value: object, most: int = 80) -> str:
    """`value` as Python writes it, on one line of at most `most` characters."""
    return one_line(repr(value), most)


def first_line(error: BaseException) -> str:
    """The first line of its message, without a full stop; the name of its type without any."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0]).rstrip(".")


def reason(problem: Exception) -> str:
    """What the system says of a failed call, without the path that the message names already."""
    return str(getattr(problem, "strerror", None) or problem)


def half_character(text: str) -> str | None:
    """The first character of `text` that UTF-8 can't encode, such as half an emoji in JSON, or
    None.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


# An expert may come from anywhere, so nothing outside its folder is read on its behalf. A symbolic
# link must stay in the folder; in a Hub cache it may lead to the blobs of the same repository.

HASHED_AT_ONCE = 2**20


def regular_file(path: Path, error: type[PhatgooseError] = ExpertError) -> Path:
    """`path`, checked to be a regular file that lies in its own folder; raises as
    `require_regular`.
    """
    require_regular(path, error)
    place, folder = path.resolve(), path.parent.resolve()
    if not any(place.is_relative_to(known) for known in (folder, *_blobs_of(folder))):
        raise error(f"{path} is a symbolic link that leads out of its folder; copy the file there.")
    return path


def require_regular(path: Path, error: type[PhatgooseError], label: str | None = None) -> int:
    """The size of the file at `path`, which messages call `label`.

    Raises FileNotFoundError when there is none, `error` for a folder, a pipe or a device.
    """
    label = label or str(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as problem:  # a loop of links, a name with a NUL
        raise error(f"{label} can't be read: {reason(problem)}.") from problem
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{label} is not a regular file.")
    return found.st_size


def refuse_pipes(place: str | Path, error: type[PhatgooseError]) -> None:
    """Raise `error` if the folder `place` or a folder in it holds pipes or devices."""
    for path in (*Path(place).glob("*"), *Path(place).glob("*/*")):
        if path.is_fifo() or path.is_char_device():
            raise error(f"{path} is not a regular file.")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal. Raises ExpertError."""
    digest = hashlib.sha256()
    try:
        with regular_file(path).open("rb") as file:
            while part := file.read(HASHED_AT_ONCE):
                digest.update(part)
        return digest.hexdigest()
    except OSError as error:
        raise ExpertError(f"{path} can't be read: {reason(error)}.") from error


def _blobs_of(folder: Path) -> tuple[Path, ...]:
    """Where huggingface_hub keeps the files of a cached snapshot, if `folder` is in one."""
    for above in (folder, *folder.parents):
        if above.parent.name == "snapshots" and above.parent.parent.name.startswith("models--"):
            return (above.parent.parent / "blobs",)
    return ()


MOST_JSON_BYTES = 16 * 2**20
MOST_NESTED = 100  # lists and objects inside each other; copying and writing recurse too


def read_json_object(path: Path, error: type[PhatgooseError] = ExpertError) -> dict[str, Any]:
    """The JSON object in the file `path`: UTF-8, no duplicate keys, no NaN or infinity, bounded.

    Raises FileNotFoundError when there is no such file, `error` for anything else that is wrong.
    """
    regular_file(path, error)
    content = parse_file(path, str(path), "JSON", MOST_JSON_BYTES, _parse_json, error)
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
    """What `parse` makes of the text in `path`, of at most `most` bytes.

    Messages call the file `label` and its format `kind`. Raises FileNotFoundError without a file,
    `error` for anything else that is wrong.
    """
    try:
        size = require_regular(path, error, label)
        if size > most:
            raise error(f"{label} has {size} bytes; at most {most} are read.")
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{label} can't be read: {reason(problem)}.") from problem
    except RecursionError as problem:
        raise error(f"{label} is not valid {kind}: it is nested too deeply.") from problem
    except ValueError as problem:
        raise error(f"{label} is not valid {kind}: {one_line(problem)}.") from problem


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`, for json's object_pairs_hook. Raises ValueError for a repeated key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {times.most_common(1)[0][0]!r} appears twice in one object")
    return found


def _parse_json(text: str) -> Any:
    return _shallow(
        json.loads(
            text,
            object_pairs_hook=distinct_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    )


def _shallow(content: Any) -> Any:
    """`content`, which has at most MOST_NESTED levels of lists and objects, else RecursionError."""
    level = [content]  # by level, since recursion is what too deep a file would exhaust
    for _ in range(MOST_NESTED):
        parts = (
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        )
        level = [inner for part in parts for inner in part]
    if any(isinstance(each, dict | list) for each in level):
        raise RecursionError
    return content


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


MOST_TOML_BYTES = 2**20  # less than of JSON: the parser is slower
YAML_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+\Z")
SEXAGESIMAL = re.compile(r":[\d:]{200}")  # 1:30 is 90; time grows with the square of the length
MOST_DOTS = 1000  # in a line: the parser's time grows with the square of a dotted key's length


def read_toml(path: Path, what: str, error: type[PhatgooseError]) -> dict[str, Any]:
    """The table in a TOML file, which messages call a `what`, such as "Recipe". Raises only
    `error`.
    """
    return _table(path, what, "TOML", _parse_toml, error)


def read_yaml(path: Path, what: str, error: type[PhatgooseError]) -> dict[str, Any]:
    """The mapping in a YAML file of plain types, without aliases. Raises as `read_toml`."""
    return _table(path, what, "YAML", _yaml_mapping, error)


def _table(
    path: Path, what: str, kind: str, parse: Callable[[str], Any], error: type[PhatgooseError]
) -> dict[str, Any]:
    label = f"{what} {path}"
    try:
        return dict(parse_file(path, label, kind, MOST_TOML_BYTES, parse, error))
    except FileNotFoundError as problem:
        raise error(f"{label} can't be read: {reason(problem)}.") from problem


def _parse_toml(text: str) -> Any:
    if max(line.count(".") for line in text.split("\n")) > MOST_DOTS:
        raise RecursionError
    return _shallow(tomllib.loads(text))


class YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # untyped
    """YAML's plain types; 2e-4 is a number, as in YAML 1.2. libyaml's is ten times faster."""


YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+0123456789."))


def parse_yaml(text: str, loader: Any = YamlLoader, aliases: int = 4) -> Any:
    """What the YAML `text` holds, with at most so many `aliases` (*name; promptsource has two).

    Raises ValueError, in one line, for what isn't YAML or would cost much time or memory.
    """
    if len(text) > MOST_TOML_BYTES:
        raise ValueError(f"it has {len(text)} characters; at most {MOST_TOML_BYTES} are read")
    depth = 0
    try:
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            aliases -= isinstance(event, yaml.AliasEvent)
            if depth > MOST_NESTED:
                raise ValueError("it is nested too deeply")
            if aliases < 0:  # aliases of aliases could make a file of a line into terabytes
                raise ValueError("aliases (*name) are not read here")
            if (getattr(event, "tag", None) or "").startswith("tag:yaml.org"):
                raise ValueError(f"types such as !!{event.tag.split(':')[-1]} are not read here")
            if SEXAGESIMAL.search(getattr(event, "value", "")):
                raise ValueError("a number is too long")
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(one_line(" ".join(str(error).split()))) from error


def _yaml_mapping(text: str) -> Any:
    content = parse_yaml(text, aliases=0)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError("wanted names with values, such as 'training:'")
    return content
