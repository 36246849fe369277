"""Unfinished training: the folder beside its result in which a run works, locked, and can resume.

The folder's name starts with a dot, so that nothing takes it for a finished result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ConfigError, ExpertError
from ..files.atomic import WRITING_ERRORS, write_text
from ..files.quoting import reason
from . import processes

__all__ = ["LOCK", "discard_work", "open_work", "wait_for_work", "work_of"]

IDENTITY, LOCK = "run.json", "lock"


@contextmanager
def open_work(
    out: Path, identity: Mapping[str, Any], *, resume: bool, restart: bool
) -> Iterator[Path]:
    """The folder `.<out's name>.work` beside `out`: new, or (`resume`) left by an earlier run.

    `identity` is what a run must share to resume the work: base, data and settings. The folder is
    locked while the context is open, or until the process is killed; of several processes of one
    training (`processes`) the first holds the lock. When the context ends and `out` is there, the
    work is removed. Raises ExpertError when `out` is there at first, when there is unfinished work
    and neither `resume` nor `restart` is set, another process holds the lock, or the folder can't
    be written; ConfigError when the work to resume has another identity.
    """
    work = work_of(out)
    if not processes.is_first():
        processes.wait_for_all()
        yield work
        return
    file, content = work / IDENTITY, json.dumps(identity, indent=2)
    try:
        _refuse_links(work)
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK)
        with lock.acquire(timeout=0):
            if out.exists():
                raise ExpertError(f"Another process has made {out} meanwhile.")
            if restart or not file.is_file():  # a restart that was killed leaves no identity
                _empty(work)
            if not file.is_file():
                write_text(file, content, ExpertError)
            elif not resume:
                raise ExpertError(
                    f"Unfinished work was found in {work}; use resume to continue it or restart to "
                    f"throw it away."
                )
            elif file.read_text(encoding="utf-8") != content:
                raise ConfigError(
                    f"The unfinished work in {work} had other settings, data or another base; "
                    f"repeat them, or use restart to throw it away."
                )
            processes.wait_for_all()
            yield work
        if out.exists():
            discard_work(out)  # its lock is free: some file systems remove no open file
    except Timeout as problem:
        raise ExpertError(f"Another process is at work on {out}, in {work}.") from problem
    except WRITING_ERRORS as problem:
        raise ExpertError(f"{out} can't be written: {reason(problem)}.") from problem


def discard_work(out: Path) -> None:
    """Remove the work beside a finished `out`, or what of it can be removed."""
    shutil.rmtree(work_of(out), ignore_errors=True)


def wait_for_work(out: Path, seconds: float) -> None:
    """Return when no process is at work on `out`, or after so many `seconds`.

    A process on another machine needs a moment to notice that its connection is lost.
    """
    lock = work_of(out) / LOCK
    if seconds > 0 and lock.exists():
        with suppress(Timeout), FileLock(lock).acquire(timeout=seconds):
            pass


def work_of(out: Path) -> Path:
    """The folder of the unfinished work on `out`."""
    return out.parent / f".{out.name}.work"


def _refuse_links(work: Path) -> None:
    """Raise ExpertError when `work` is or holds a symbolic link, which no run makes."""
    for path in (work, *(work.rglob("*") if not work.is_symlink() else ())):
        if path.is_symlink():
            raise ExpertError(f"{path} is a symbolic link, which no unfinished work is; remove it.")


def _empty(work: Path) -> None:
    """Remove everything in `work` but its lock; first what says whose work it is.

    What a kill leaves is then nobody's.
    """
    (work / IDENTITY).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
