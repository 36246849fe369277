"""Files of tensors as views of their mapping, and reading ahead in threads."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ExpertError
from .strict import MOST_JSON_BYTES, distinct_keys, one_line, reason, regular_file, shortened

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in order, computed in as many threads as torch has.

    At most that many results wait to be taken. The first error is raised in its item's place; no
    further item is started.
    """
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


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    "U8": torch.uint8,
}
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


class TensorFile(Mapping[str, Tensor]):
    """Every tensor of a safetensors file by name, as read-only views of the mapped file.

    Opening reads the header only. A file that is replaced (renamed over) keeps its old content
    here. Raises ExpertError for a file that is missing, unreadable or damaged, a huge header, and
    tensors with impossible names, shapes or types.
    """

    def __init__(self, path: Path) -> None:
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
            if dtype in FLOATS:
                yield dtype, together[0].begin, together[-1].end


class Group(Mapping[str, Tensor]):
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
        math.isfinite(part.sum()) or bool(torch.isfinite(part).all())
        for part in torch.split(tensor.flatten(), FEW)
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
    if dtype not in TYPES:
        raise ValueError(f"it holds numbers of type {shortened(dtype)}, not {', '.join(TYPES)}")
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    begin, end = data_offsets
    if math.prod(max(size, 1) for size in shape) > MOST_NUMBERS:  # beside a 0, so it takes no room
        raise ValueError(f"it holds a tensor with an impossible shape, {shortened(shape)}")
    return TensorRecord(TYPES[dtype], tuple(shape), strides, begin, end)


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
