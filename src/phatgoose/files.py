"""The only door for untrusted bytes, which are read strictly; our own files are written whole."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import secrets
import stat
import struct
import tempfile
import tomllib
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import cache, lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from safetensors import SafetensorError, safe_open

from .errors import ErrorKind, ExpertError, PhatgooseError

if TYPE_CHECKING:  # torch is imported by what needs it: the command line reads recipes without it
    import torch
    from pydantic import TypeAdapter
    from torch import Tensor

Item = TypeVar("Item")
Kind = TypeVar("Kind")
Result = TypeVar("Result")


def one_line(text: object, most: int = 300) -> str:
    """`text` as one printable line of at most `most` characters: untrusted names may be in it."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[: most + 1])
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
    """The first character that UTF-8 can't encode, such as half an emoji in JSON, or None."""
    half = re.search("[\ud800-\udfff]", text)
    return half[0] if half else None


# Where files may be, and what they are.


def user_cache() -> Path:
    """`phatgoose` in XDG_CACHE_HOME (if absolute) or in ~/.cache. RuntimeError if ~ is unknown."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named if os.path.isabs(named) else "~/.cache").expanduser() / "phatgoose"


def regular(path: Path) -> Path:
    """`path`. OSError, for `reading`, unless it is a regular file: a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path


def regular_file(
    path: Path,
    error: ErrorKind = ExpertError,
    hint: str = "",
    owner: Path | None = None,
) -> Path:
    """`path`, a regular file in its own folder, or in a Hub cache a link to the repository's blobs.

    An expert may come from anywhere, so nothing outside its folder is read on its behalf. `owner`
    is that folder where the file is in one inside it. Raises `error`.
    """
    with reading(path, error, hint):
        place = regular(path).resolve()
        folder = (owner or path.parent).resolve()
        allowed = [folder]
        for above in folder.parents:
            if above.name == "snapshots" and above.parent.name.startswith("models--"):
                allowed.append(above.parent / "blobs")
        if not any(map(place.is_relative_to, allowed)):
            raise OSError("it is a link that leads out of its folder; copy the file there")
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal. Raises ExpertError."""
    with reading(path), regular_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# JSON, which may be of others, and TOML, which users name.

JsonObject = dict[str, Any]  # or a table of TOML
MOST_JSON_BYTES = 16 * 2**20
MOST_JSON_VALUES = 2**18  # of each that is wrong pydantic makes a record of a kilobyte
# pydantic's errors that need no value
UNSHOWN = ("missing", "value_error", "too_short", "too_long")


@contextmanager
def reading(what: object, error: ErrorKind = ExpertError, hint: str = "") -> Iterator[None]:
    """What goes wrong while `what` is read becomes an `error` of one line that begins with it.

    Whoever made a file may make the system and any library raise anything. `hint` is added if there
    is no such file. Our own errors pass as they are.
    """
    try:
        yield
    except PhatgooseError:
        raise
    except Exception as problem:
        raise error(one_line(f"{what} {_what_is_wrong(problem, hint)}", 600)) from problem


def _what_is_wrong(problem: Exception, hint: str) -> str:
    if isinstance(problem, FileNotFoundError):
        return f"does not exist.{hint}"
    if isinstance(problem, OSError):
        return f"can't be read: {reason(problem)}."
    if isinstance(problem, RecursionError):
        return "is not valid: it is nested too deeply."
    if isinstance(problem, KeyError):
        return f"is not valid: it lacks {shortened(*problem.args)}."
    if isinstance(problem, json.JSONDecodeError):
        return f"is not valid: {problem}; wanted JSON, got {shortened(problem.doc, 40)}."
    from pydantic import ValidationError

    if isinstance(problem, ValidationError):
        first = problem.errors(include_url=False)[0]
        complaint = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            complaint = f"{'.'.join(map(str, first['loc']))}: {complaint}"
        if first["type"] not in UNSHOWN:
            complaint += f", got {shortened(first['input'])}"
    else:
        message = " ".join(str(problem).split())
        complaint = one_line(message or type(problem).__name__).rstrip(".")
    return f"is not valid: {complaint}."


def read_json(
    path: Path,
    kind: type[Kind] = dict,  # type: ignore[assignment]  # python/mypy#3737
    error: ErrorKind = ExpertError,
    hint: str = "",
) -> Kind:
    """The content of a JSON file as a `kind`, whose declaration is all that checks it.

    A dataclass, a pydantic model or a type such as dict[str, float], read strictly: true is no
    number, "1" neither. A dict holds any object. The file is UTF-8 without duplicate keys, NaN or
    infinity, not too large and not too deep. Raises only `error`, in one line; see `reading`.
    """
    with reading(path, error, hint):
        with regular_file(path, error, hint).open("rb") as file:
            content = file.read(MOST_JSON_BYTES + 1)
        if len(content) > MOST_JSON_BYTES or content.count(b",") > MOST_JSON_VALUES:
            raise ValueError(f"at most {MOST_JSON_BYTES} bytes, {MOST_JSON_VALUES} values are read")
        return parse_json(content.decode("utf-8"), kind)


def parse_json(text: str, kind: type[Kind]) -> Kind:
    """The JSON `text` as a `kind`, as `read_json` has it. Raises ValueError or RecursionError."""

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits} is not a JSON number, or too large")
        return value

    # pydantic would take the last of two keys and a number that is too large.
    json.loads(text, object_pairs_hook=distinct_keys, parse_constant=number, parse_float=number)
    return cast(Kind, _adapter(cast(Hashable, kind)).validate_json(text, strict=True))


@cache
def _adapter(kind: Any) -> TypeAdapter[object]:
    from pydantic import TypeAdapter  # the command line's help can do without

    return TypeAdapter(kind)


def read_table(path: Path, what: str, error: ErrorKind) -> JsonObject:
    """The table in a TOML file of the user's, which messages call a `what`, such as "Recipe".

    Raises only `error`.
    """
    with reading(f"{what} {path}", error):
        return tomllib.loads(regular(path).read_text(encoding="utf-8"))


def distinct_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of `pairs`, for json's object_pairs_hook. Raises ValueError for a repeated key."""
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {shortened(key)} appears twice in one object")
        content[key] = value
    return content


# Tensors, as views of a mapped file: what is used is what was checked.

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
LENGTH = struct.Struct("<Q")  # the header's length, which precedes it
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

    def __init__(self, path: Path, hint: str = "") -> None:
        import torch

        self.path = path
        with reading(path):
            with regular_file(path, hint=hint).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._data = LENGTH.size + LENGTH.unpack_from(self._map)[0]
            # The library would parse a huge header for seconds and take gigabytes.
            if self._data - LENGTH.size > MOST_JSON_BYTES:
                raise ValueError(f"its header has {self._data - LENGTH.size} bytes")
            with safe_open(path, "pt"):
                pass  # the library checks lengths, types, shapes and offsets strictly
            read = _records if self._data <= MOST_CACHED else _records.__wrapped__
            self.records = read(self._map[LENGTH.size : self._data])
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        storage = self._bytes.untyped_storage()
        self._typed = {}
        for dtype in {record.dtype for record in self.records.values()}:
            self._typed[dtype] = torch.empty(0, dtype=dtype).set_(storage)

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, strides, begin, end = self.records[name]
        if (self._data + begin) % dtype.itemsize:
            return self._part(begin, end, dtype).view(shape)
        # One call for each of a pool's many thousand tensors, where slices and views take four.
        return self._typed[dtype].as_strided(shape, strides, (self._data + begin) // dtype.itemsize)

    def _part(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        part = self._bytes[self._data + begin : self._data + end]
        # Other writers need not align tensors to their type, and torch can't view such bytes.
        is_aligned = (self._data + begin) % dtype.itemsize == 0
        return (part if is_aligned else part.clone()).view(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def under(self, prefix: str) -> TensorFile:
        """The tensors whose names begin with `prefix` and a full stop, by the rest of the name."""
        part = copy(self)
        begin = f"{prefix}."
        part.records = {}
        for name, record in self.records.items():
            if name.startswith(begin):
                part.records[name.removeprefix(begin)] = record
        return part

    def sha256(self) -> str:
        digest = hashlib.sha256()
        content = memoryview(self._map)
        for begin in range(0, len(content), AT_ONCE):
            digest.update(content[begin : begin + AT_ONCE])
            self.release()
        return digest.hexdigest()

    def check_finite(self) -> None:
        """Raise ExpertError, naming one, when a tensor holds a NaN or an infinity."""
        in_order = sorted(self.records.values(), key=attrgetter("begin", "end"))
        for dtype, run in groupby(in_order, key=attrgetter("dtype")):  # they leave no gaps
            adjacent = list(run)
            end = adjacent[-1].end
            for begin in range(adjacent[0].begin, end, AT_ONCE):
                part = self._part(begin, min(begin + AT_ONCE, end), dtype)
                if dtype.is_floating_point and not is_finite(part):
                    name = next(name for name, tensor in self.items() if not is_finite(tensor))
                    raise ExpertError(f"{self.path}: tensor {name} is not finite.")
                self.release()

    def release(self) -> None:
        """Give the memory of its bytes back; they are read from the file again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def is_finite(tensor: Tensor) -> bool:
    """True if no number of `tensor` is infinite or NaN."""
    return all(
        # A finite sum, which is far cheaper, already shows it; a sum may also overflow.
        math.isfinite(part.sum()) or part.isfinite().all()
        for part in tensor.flatten().split(FEW)  # type: ignore[no-untyped-call]
    )


@lru_cache(maxsize=16)  # the experts of a pool mostly share one header
def _records(header: bytes) -> dict[str, TensorRecord]:
    import torch

    table = json.loads(header, object_pairs_hook=distinct_keys)
    table.pop("__metadata__", None)
    records = {}
    for name, about in table.items():
        dtype = about["dtype"]
        shape = tuple(about["shape"])
        # Beside a 0, no size takes room; thousands of sizes would take hours.
        fits = len(shape) < 9 and math.prod(max(size, 1) for size in shape) <= MOST_NUMBERS
        can_be_named = name.isprintable() and len(name) <= LONGEST_NAME
        if not (fits and can_be_named and dtype in TYPES):
            raise ValueError(f"tensor {shortened(name)} is of {shortened(dtype)}, {shape!s:.80}")
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        kind = getattr(torch, TYPES[dtype])
        records[name] = TensorRecord(kind, shape, strides, *about["data_offsets"])
    return records


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in order, computed in as many threads as torch has."""
    import torch

    threads = torch.get_num_threads()
    waiting = deque[Future[Result]]()
    with ThreadPoolExecutor(threads) as workers:
        for item in items:
            waiting.append(workers.submit(function, item))
            # No more than one each ahead: results may be large.
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# Files and folders that appear whole or not at all. A killed process may leave a hidden one,
# `.NAME.unfinished-…`, beside the result that it would have become.

WRITING_ERRORS = (OSError, SafetensorError)  # safetensors has an error of its own for a full disk


@contextmanager
def new_directory(target: Path, error: ErrorKind, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the context ends well, and vanishes otherwise.

    With `overwrite` an existing `target` is replaced, and kept if that fails. Raises `error` if
    `target` exists without it (even since a moment ago), or can't be written.
    """
    # A path that holds while the folder is renamed: ".." may lead through it, and "." is it.
    place = target.resolve()
    if target.name not in ("", ".."):
        place = target.parent.resolve() / target.name
    with writing(target, error):
        place.parent.mkdir(parents=True, exist_ok=True)
        if not overwrite:
            require_free(target, error)
        with tempfile.TemporaryDirectory(
            prefix=f".{place.name}.unfinished-", dir=place.parent, ignore_cleanup_errors=True
        ) as scratch:
            work = Path(scratch) / "new"  # which has the usual permissions, unlike `scratch`
            work.mkdir()
            yield work
            for path in work.rglob("*"):
                _give_default_mode(path)
            if overwrite and place.exists():
                work.chmod(stat.S_IMODE(place.stat().st_mode))  # what was private stays so
                _replace(work, place)
            else:
                os.rename(work, place)


def _replace(new: Path, target: Path) -> None:
    # In two steps, so a kill between them leaves the old folder beside its place, under this name.
    old = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    os.rename(old, new)  # which is removed


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """The path of a file to write that becomes `target` when the context ends well.

    A link at `target` is replaced, never written through. Raises OSError for pipes and devices.
    """
    if _is_stream(target):
        raise OSError("it is no regular file")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished-{secrets.token_hex(4)}")
    try:
        yield unfinished
        _give_default_mode(unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _give_default_mode(path: Path) -> None:
    if not path.is_symlink():  # chmod would follow it
        mask = os.umask(0)  # which can be read only by setting it
        os.umask(mask)
        path.chmod((0o777 if os.access(path, os.X_OK) else 0o666) & ~mask)


@contextmanager
def writing(what: object, error: ErrorKind) -> Iterator[None]:
    """The system's errors while `what` is written become an `error` of one line."""
    try:
        yield
    except WRITING_ERRORS as problem:
        raise error(f"{what} can't be written: {reason(problem)}.") from problem


def write_text(path: Path, content: str, error: ErrorKind) -> None:
    """Write `content` to `path`: all of it or nothing. Raises `error`."""
    with writing(path, error), new_file(path) as unfinished:
        unfinished.write_text(content, encoding="utf-8")


def _is_stream(target: Path) -> bool:
    # An open file by its name (/dev/stdout) may be a regular one, and its link must stay.
    is_open = str(target).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return is_open or (target.exists() and not target.is_file())


def require_free(target: Path, error: ErrorKind, instead: str = "choose another place") -> None:
    """Raise `error` if something is at `target`; `instead` says what to do."""
    if target.exists():
        raise error(f"{target} exists already; {instead}.")


def require_writable(target: Path, error: ErrorKind) -> None:
    """Raise `error` unless a file can be written at `target`; nothing is made there."""
    # The nearest folder that exists; those between are made later.
    folder = next(filter(Path.exists, target.absolute().parents))
    if _is_stream(target):
        why = "it is no file; name one"
    elif not folder.is_dir():
        why = f"{folder} is no folder; name one"
    elif not os.access(folder, os.W_OK | os.X_OK):
        why = f"the folder {folder} may not be written to; name another"
    else:
        return
    raise error(f"{target} can't be written: {why}.")
