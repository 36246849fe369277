"""Files of others read strictly, ours written all or nothing: the only door for untrusted bytes."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import stat
import struct
import tempfile
import time
import tomllib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import re2
import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open

from .errors import ExpertError, PhatgooseError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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


def user_cache() -> Path:
    """`phatgoose` in XDG_CACHE_HOME (if absolute) or in ~/.cache. RuntimeError if ~ is unknown."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(named) if os.path.isabs(named) else Path("~/.cache").expanduser()
    return home / "phatgoose"


OPEN_FILES = re.compile(r"/dev/fd|/proc/[^/]+(/task/[^/]+)?/fd")  # folders of them
MOST_LINKS = 40
WRITING_ERRORS = (OSError, SafetensorError)  # safetensors has an error of its own for a full disk


@contextmanager
def new_directory(
    target: Path, error: type[PhatgooseError], *, overwrite: bool = False
) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the context ends well, and vanishes otherwise.

    With `overwrite` an existing `target` is replaced, and kept if that fails. Raises `error` if
    `target` exists without it (even since a moment ago), or can't be written.
    """
    told = target
    # A path that holds while the folder is renamed: ".." may lead through it, and "." is it.
    has_name = target.name not in ("", "..")
    target = target.parent.resolve() / target.name if has_name else target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_left_overs(target)
        if not overwrite:
            require_free(target, error)
        with temporary_folder(target) as work:
            yield work
            open_to_readers(work)
            if not (overwrite and target.exists()):
                os.rename(work, target)
                return
            work.chmod(stat.S_IMODE(target.stat().st_mode))  # what was private stays so
            with temporary_folder(target, REPLACED) as old:  # it restores `target` on failure
                os.rename(target, old / target.name)
                os.rename(work, target)
    except WRITING_ERRORS as problem:
        if not overwrite:
            require_free(told, error)
        raise error(f"{told} can't be written: {reason(problem)}.") from problem


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary file that becomes `target` when the context ends well, and vanishes otherwise.

    A link at `target` is replaced, never written through; a pipe or a device is written into.
    """
    if is_stream(target):
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / target.name
            yield whole
            # Appended, since others may have written to the same redirected file.
            with whole.open("rb") as content, target.open("ab") as stream:
                shutil.copyfileobj(content, stream)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_left_overs(target)
    with temporary_file(target) as unfinished:
        yield unfinished
        os.replace(unfinished, target)


def is_stream(target: Path) -> bool:
    """True for pipes, devices, open files by name (/dev/stdout), and links to these."""
    # Link by link: resolved at once, /dev/stdout is the file that the shell redirected it to.
    place = str(target)
    for _ in range(MOST_LINKS):
        if OPEN_FILES.fullmatch(os.path.dirname(os.path.abspath(place))):
            return True
        if not os.path.islink(place):
            break
        place = os.path.join(os.path.dirname(place), os.readlink(place))
    return os.path.exists(place) and not os.path.isfile(place) and not os.path.isdir(place)


def require_free(
    target: Path, error: type[PhatgooseError], instead: str = "choose another place"
) -> None:
    """Raise `error` if something is at `target`; `instead` says what to do."""
    if is_there(target):
        raise error(f"{target} exists already; {instead}.")


def require_writable(target: Path, error: type[PhatgooseError]) -> None:
    """Raise `error` unless a file can be written at `target`; nothing is made there yet."""
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        if is_stream(target):
            return
        # The nearest folder that exists; those between are made later.
        folder = next(each for each in target.absolute().parents if each.exists())
        with temporary_file(folder / target.name):
            pass
    except OSError as problem:
        raise error(f"{target} can't be written: {reason(problem)}.") from problem


def write_text(path: Path, content: str, error: type[PhatgooseError]) -> None:
    """Write `content` to `path`: all of it or nothing. Raises `error`."""
    try:
        with new_file(path) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    except OSError as problem:
        raise error(f"{path} can't be written: {reason(problem)}.") from problem


# A process holds a lock (flock) on its temporary files and folders, so an unlocked one has no owner
# any more and may be removed. On file systems without locks nothing is removed.
try:
    import fcntl
except ImportError:  # on Windows leftovers stay
    fcntl = None  # type: ignore[assignment]

UNFINISHED, REPLACED = "unfinished", "replaced"  # a new result, and the old one it replaces
YOUNG = 60.0  # seconds; the process that made so new a file may not have locked it yet
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor wait for a pipe


@contextmanager
def temporary_folder(target: Path, kind: str = UNFINISHED) -> Iterator[Path]:
    """A new folder beside `target` for this process alone, removed when the context ends.

    With kind REPLACED it holds the old `target`, which goes back if nothing took its place.
    """
    folder = Path(tempfile.mkdtemp(prefix=_prefix(target, kind), dir=target.parent))
    with _held(folder):
        try:
            yield folder
        finally:
            with suppress(OSError):
                _remove(folder, target)


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """A new empty file beside `target` with default modes, removed when the context ends."""
    opened, name = tempfile.mkstemp(prefix=_prefix(target, UNFINISHED), dir=target.parent)
    held = _lock(opened)
    if not held:
        os.close(opened)  # some systems can't rename an open file
    try:
        _give_default_mode(Path(name))
        yield Path(name)
    finally:
        with suppress(OSError):
            os.unlink(name)
        if held:
            os.close(opened)


def clear_left_overs(target: Path) -> None:
    """Remove what dead processes left beside `target`; bring back a folder without a successor."""
    bring_back(target)
    prefixes = tuple(_prefix(target, kind) for kind in (REPLACED, UNFINISHED))
    for path in sorted(target.parent.iterdir()):
        if not path.name.startswith(prefixes):
            continue
        with suppress(OSError):  # another process may clear it too
            found = path.lstat()
            ours = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)  # a pipe may block
            if ours and time.time() - found.st_ctime >= YOUNG:
                with _held(path) as is_ours:
                    if is_ours:
                        _remove(path, target)


def bring_back(target: Path) -> None:
    """Put what was at `target` back if the process that replaced it was killed."""
    with suppress(OSError):
        if os.path.exists(target):
            return
        for path in target.parent.iterdir():
            if path.name.startswith(_prefix(target, REPLACED)):
                with _held(path) as is_ours:
                    if is_ours and _is_kept(path, target):
                        os.rename(path / target.name, target)
                        path.rmdir()


def is_there(target: Path) -> bool:
    """True when something is at `target`, brought back if need be, and may be seen."""
    bring_back(target)
    return os.path.exists(target)


def being_replaced(folder: Path) -> list[Path]:
    """The old results of `folder` that other processes replace just now, out of their place."""
    kept = []
    for name in sorted(os.listdir(folder)):
        of, found, _ = name.rpartition(f".{REPLACED}-")
        target = folder / of[1:]
        if found and of.startswith("."):
            bring_back(target)
            if _is_kept(folder / name, target):
                kept.append(folder / name / target.name)
    return kept


def open_to_readers(folder: Path) -> None:
    """Give `folder` and all in it the permissions that new files, or programs, usually have."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():  # chmod would follow it
            _give_default_mode(path)


def _give_default_mode(path: Path) -> None:
    # The mask can be read only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if os.access(path, os.X_OK) else 0o666) & ~mask)


def _remove(path: Path, target: Path) -> None:
    if _is_kept(path, target):
        os.rename(path / target.name, target)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_kept(path: Path, target: Path) -> bool:
    """True for a folder that holds a replaced result which has no successor."""
    is_one = path.name.startswith(_prefix(target, REPLACED))
    return is_one and os.path.exists(path / target.name) and not os.path.exists(target)


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.{kind}-"


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """True while `path` is locked here; False if another process has it or it can't be locked."""
    try:
        opened = os.open(path, os.O_RDONLY | NO_LINK)
    except OSError:
        yield False
        return
    try:
        yield _lock(opened)
    finally:
        os.close(opened)


def _lock(opened: int) -> bool:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):
        return False
    return True


NAMES = ("target_modules", "exclude_modules", "feedforward_modules")  # a list, or one pattern
BY_PATTERN = "_pattern"  # suffix of the options that map patterns to values

MOST_PATTERNS = 2000
MOST_CHARACTERS = 2000  # of one pattern
MOST_NAMES = 20_000  # in a list
MOST_TOGETHER = 200_000  # of all patterns: half of it names every layer of a large model
PLAIN = re.compile(r"[\w.-]*")  # a name; in a pattern its dots match any character
# What RE2 reads differently from Python: its own classes, {,n}, flags, quoting and anchors.
READ_DIFFERENTLY = re.compile(r"\[\[:|\{,|\(\?[^:]|\\[pPCQEzZ]")

OPTIONS = re2.Options()
OPTIONS.max_mem = 2**20
OPTIONS.log_errors = False
OPTIONS.never_capture = True


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ExpertError, naming `where`, unless all patterns and names of a PEFT `config` are
    matchable.
    """
    for key, value in config.items():
        place = f"{where}: {key}"
        if key.endswith(BY_PATTERN) and isinstance(value, Mapping):
            check_patterns(value, place)
        elif key in NAMES and isinstance(value, str):
            check_patterns([value], place)
        elif isinstance(value, list) and len(value) > MOST_NAMES:
            raise ExpertError(f"{place} lists {len(value)} values; at most {MOST_NAMES} are read.")
        elif key == "layers_pattern":
            for text in value if isinstance(value, list) else [value]:
                if text is not None and not PLAIN.fullmatch(str(text)[:MOST_CHARACTERS]):
                    raise ExpertError(f"{place} is {shortened(text)}, but must be a plain name.")


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Raise ExpertError unless all `patterns`, which `where` holds, match in linear time."""
    listed = list(patterns)
    if len(listed) > MOST_PATTERNS or sum(map(len, listed)) > MOST_TOGETHER:
        raise ExpertError(
            f"{where} holds {len(listed)} patterns of {sum(map(len, listed))} characters; at most "
            f"{MOST_PATTERNS} and {MOST_TOGETHER} are read."
        )
    for pattern in listed:
        if len(pattern) > MOST_CHARACTERS:
            raise ExpertError(
                f"{where} holds a regular expression of {len(pattern)} characters, "
                f"{shortened(pattern)}; at most {MOST_CHARACTERS} are read."
            )
        if PLAIN.fullmatch(pattern):
            continue
        if READ_DIFFERENTLY.search(pattern):
            raise ExpertError(
                f"{where} holds {shortened(pattern)}, which can't be matched in linear time; "
                f"write it without look-around, references, flags and classes such as \\p."
            )
        try:
            _expression(pattern)
        except (re2.error, UnicodeEncodeError) as error:
            raise ExpertError(
                f"{where} holds no regular expression that RE2 can match: {shortened(pattern)}, "
                f"{_reason(error)}."
            ) from error


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The `names` that `pattern` matches in full. It must have passed `check_patterns`."""
    whole = _expression(pattern)
    return [name for name in names if whole.fullmatch(name)]


def value_at(patterns: Mapping[str, Any], name: str) -> Any:
    """The value of the first of `patterns` that matches `name` or its end after a dot, else None.

    As PEFT reads rank_pattern and alpha_pattern (`get_pattern_key`).
    """
    return next((value for pattern, value in patterns.items() if _ends(name, pattern)), None)


class ByName(dict[str, Any]):
    """Values by full layer names, in place of values by pattern in a PEFT config."""

    def keys(self) -> Any:
        # PEFT tries each key as a pattern and then looks up the layer's own name: without keys it
        # finds the value at once.
        return {}.keys()


def _ends(name: str, pattern: str) -> bool:
    if not PLAIN.fullmatch(pattern):
        return _expression(rf"(?:.*\.)?(?:{pattern})").fullmatch(name) is not None
    begin = len(name) - len(pattern)
    if begin < 0 or (begin and name[begin - 1] != "."):
        return False
    # To PEFT a plain name is a pattern, too, whose dots match any character.
    return name.endswith(pattern) or _plain(pattern).fullmatch(name, begin) is not None


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _expression(pattern: str) -> Any:
    return re2.compile(pattern, OPTIONS)


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _plain(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("-", r"\-"))


def _reason(error: Exception) -> str:
    message = error.args[0] if error.args else error
    # RE2's messages are bytes, and quote the pattern.
    if isinstance(message, bytes):
        message = message.decode("utf-8", "backslashreplace")
    return one_line(message, 80)


Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in order, computed in as many threads as torch has.

    At most that many results wait to be taken. The first error is raised in its item's place; no
    further item is started.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        # Handing a small result over takes longer than computing it.
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as workers:
        try:
            for item in items:
                waiting.append(workers.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# torch is imported by what needs it, since the command line reads recipes and --help without it.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TYPES = {**FLOATS, "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError)
LENGTH = struct.Struct("<Q")  # the header's length, which precedes it
LONGEST_HEADER = 100_000_000  # bytes
LONGEST_NAME = 500
MOST_NUMBERS = 2**48  # of a tensor
MOST_CACHED = 2**20  # bytes of a header that is parsed once for all files that share it
AT_ONCE = 2**24  # bytes that are read before their pages are released
FEW = 2**15 - 64  # numbers that torch sums in one thread: other threads may be busy


class TensorRecord(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int
    end: int


class TensorFile(Mapping[str, "Tensor"]):
    """Every tensor of a safetensors file by name, as read-only views of the mapped file.

    Opening reads the header only. A file that is replaced (renamed over) keeps its old content
    here. Raises ExpertError for a file that is missing, unreadable or damaged, a huge header, and
    tensors with impossible names, shapes or types.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            _check_header(regular_file(path))
            with safe_open(path, "pt"):
                pass  # the library checks lengths, types, shapes and offsets strictly
            size = path.stat().st_size
            storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
            self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)
            (length,) = LENGTH.unpack(self._content(0, LENGTH.size))
            self._data = LENGTH.size + length
            header = bytes(self._content(LENGTH.size, self._data))
            read = _records if length <= MOST_CACHED else _records.__wrapped__
            self.records = read(header)
            self._typed = {
                dtype: torch.empty(0, dtype=dtype).set_(storage)
                for dtype in {record.dtype for record in self.records.values()}
            }
        except FileNotFoundError as error:
            raise ExpertError(f"{path} does not exist.") from error
        except PermissionError as error:
            raise ExpertError(f"{path} can't be read: {reason(error)}.") from error
        except DAMAGE as error:
            raise ExpertError(f"{path} is damaged or truncated: {one_line(error)}.") from error

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, strides, begin, _ = self.records[name]
        return self._view(dtype, shape, strides, begin)

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for begin in range(0, len(self._bytes), AT_ONCE):
            digest.update(self._content(begin, begin + AT_ONCE))
            self._release(begin, begin + AT_ONCE)
        return digest.hexdigest()

    def check_finite(self) -> None:
        """Raise ExpertError, naming one, when a tensor holds a NaN or an infinity."""
        for dtype, first, end in self._runs():
            for begin in range(first, end, AT_ONCE):
                size = min(AT_ONCE, end - begin)
                if not is_finite(self._view(dtype, (size // dtype.itemsize,), (1,), begin)):
                    bad = next(n for n, t in self.items() if t.dtype == dtype and not is_finite(t))
                    raise ExpertError(
                        f"{self.path}: tensor {bad} holds a value that is not finite."
                    )
                self._release(self._data + begin, self._data + begin + size)

    def release(self) -> None:
        self._release(0, len(self._bytes))

    def _content(self, begin: int, end: int) -> memoryview:
        return memoryview(self._bytes[begin:end].numpy())  # type: ignore[arg-type]

    def _release(self, begin: int, end: int) -> None:
        if _madvise is not None:
            begin -= begin % mmap.PAGESIZE  # a mapping begins at a page
            size = min(end, len(self._bytes)) - begin
            # Pages of a private mapping are read from the file again, without what was written to
            # them.
            _madvise(self._bytes.data_ptr() + begin, size, mmap.MADV_DONTNEED)

    def _view(
        self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], begin: int
    ) -> Tensor:
        place = self._data + begin
        if place % dtype.itemsize:
            # Other writers need not align tensors to their type, and torch can't view such bytes.
            size = math.prod(shape) * dtype.itemsize
            return self._bytes[place : place + size].clone().view(dtype).view(shape)
        return self._typed[dtype].as_strided(shape, strides, place // dtype.itemsize)

    def _runs(self) -> Iterator[tuple[torch.dtype, int, int]]:
        """(type, first byte, end) of each run of adjacent tensors of one floating point type."""
        in_order = sorted(self.records.values(), key=lambda record: record.begin)
        for dtype, run in groupby(in_order, key=lambda record: record.dtype):
            together = list(run)
            if dtype.is_floating_point:
                yield dtype, together[0].begin, together[-1].end


class Group(Mapping[str, "Tensor"]):
    """A file's tensors whose names begin with `prefix` and a full stop, without these."""

    def __init__(self, file: Mapping[str, Tensor], prefix: str) -> None:
        self._file = file
        begin = f"{prefix}."
        self._names = {n.removeprefix(begin): n for n in file if n.startswith(begin)}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        return self._file[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def is_finite(tensor: Tensor) -> bool:
    """True if no number of `tensor` is infinite or NaN."""
    return all(
        # A finite sum, which is far cheaper, already shows it; a sum may also overflow.
        math.isfinite(part.sum()) or bool(part.isfinite().all())
        for part in tensor.flatten().split(FEW)  # type: ignore[no-untyped-call]
    )


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(LENGTH.size)
        length = LENGTH.unpack(begin)[0] if len(begin) == LENGTH.size else 0
        # The library would parse a huge header for seconds and take gigabytes.
        if MOST_JSON_BYTES < length <= LONGEST_HEADER:  # the library refuses longer ones
            used = len(file.read(length).rstrip())  # padding costs nothing
            if used > MOST_JSON_BYTES:
                raise ValueError(f"its header has {used} bytes; at most {MOST_JSON_BYTES} are read")


@lru_cache(maxsize=16)  # the experts of a pool mostly share one header
def _records(header: bytes) -> dict[str, TensorRecord]:
    table: dict[str, Any] = json.loads(header, object_pairs_hook=distinct_keys)
    table.pop("__metadata__", None)
    for name in table:
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(f"it holds a tensor with an impossible name, {shortened(name)}")
    return {name: _record(**held) for name, held in table.items()}


def _record(dtype: str, shape: list[int], data_offsets: list[int]) -> TensorRecord:
    import torch

    if dtype not in TYPES:
        raise ValueError(f"it holds numbers of type {shortened(dtype)}, not {', '.join(TYPES)}")
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    begin, end = data_offsets
    if math.prod(max(size, 1) for size in shape) > MOST_NUMBERS:  # beside a 0, so it takes no room
        raise ValueError(f"it holds a tensor with an impossible shape, {shortened(shape)}")
    return TensorRecord(getattr(torch, TYPES[dtype]), tuple(shape), strides, begin, end)


def _find_madvise() -> Any:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _find_madvise()


def load_entry_points(group: str) -> dict[str, Any]:
    """The objects registered under `group`, by name and sorted; the first of several with one name.

    One that can't be loaded is left out with a warning that names its package.
    """
    loaded: dict[str, Any] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda point: point.name):
        try:
            loaded.setdefault(point.name, point.load())
        except Exception as error:  # whatever another package's import may raise
            package = point.dist.name if point.dist else "an unknown package"
            warnings.warn(
                f"{group}: {point.name} of {package} can't be loaded: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
    return loaded


def add_entry_points(group: str, known: dict[str, Any], record: type) -> None:
    """Add to `known` the objects of class `record` that are registered under `group`, by name.

    One of another class, or whose name is taken or not its own, is left out with a warning.
    """
    for name, found in load_entry_points(group).items():
        if isinstance(found, record) and name not in known and getattr(found, "name", name) == name:
            known[name] = found
            continue
        what = (
            f"the name {name!r} is taken"
            if name in known
            else f"it is no {record.__name__} so named"
        )
        warnings.warn(f"{group}: {name} is left out: {what}.", stacklevel=3)
