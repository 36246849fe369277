"""Finished results in a file of JSON lines, appended one by one and found by their key."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import EvaluationError
from ...files import reason, require_regular

LOCK = ".lock"


class ResultStore:
    """Results by key (any JSON object) in the JSON Lines file `path`, made by the first result.

    Every result is on the disk when `add` returns. Raises EvaluationError when the file can't be
    read or written, is a symbolic link, or has a line that is no result.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        self._cut_off_at: int | None = None
        for line in self._complete_lines():
            try:
                record = json.loads(line)
                self._records[_digest(record["key"])] = record["key"], record["result"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise EvaluationError(
                    f"{self.path} is no file of results: {line[:40]!r} is no result. Move it away."
                ) from error

    @classmethod
    @contextmanager
    def alone(cls, path: str | Path) -> Iterator[ResultStore]:
        """The store at `path`, locked against other processes, or EvaluationError if one has it."""
        folder = Path(path).parent
        lock = FileLock(folder / LOCK)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise EvaluationError(
                f"Another process is adding results to {path}; wait, or choose another --out."
            ) from error
        except OSError as error:
            raise EvaluationError(f"{folder} can't be written: {reason(error)}.") from error
        try:
            yield cls(path)
        finally:
            lock.release()

    def get(self, key: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return self._records.get(_digest(key), (key, None))[1]

    def add(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        line = json.dumps({"key": key, "result": result}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", opener=_no_link) as file:
                # Reading changed nothing: a last line that was cut off goes only now.
                if self._cut_off_at is not None:
                    file.truncate(self._cut_off_at)
                    self._cut_off_at = None
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(f"{self.path} can't be written: {reason(error)}.") from error
        self._records[_digest(key)] = key, result

    def items(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def _complete_lines(self) -> Iterator[str]:
        if self.path.is_symlink():
            raise EvaluationError(f"{self.path} is a symbolic link; results go to a file itself.")
        if not self.path.exists():
            return
        require_regular(self.path, EvaluationError)
        try:
            content = self.path.read_bytes()
            complete = content.rfind(b"\n") + 1
            if complete < len(content):
                warnings.warn(f"{self.path}: the last result was cut off; dropped.", stacklevel=3)
                self._cut_off_at = complete
            # str.splitlines would also split at U+2028 and U+0085, which answers may hold.
            yield from content[:complete].decode("utf-8").split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"Results {self.path} can't be read: {reason(error)}.") from error


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
