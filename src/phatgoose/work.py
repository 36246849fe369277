"""Writing so that what exists is complete: unfinished work and results renamed into place.

Unfinished folders stand beside their result and have names that start with a dot, so nothing takes
them for a finished one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from . import processes
from .errors import ConfigError, ExpertError, PhatgooseError
from .left_overs import (
    REPLACED,
    clear_left_overs,
    open_to_readers,
    temporary_file,
    temporary_folder,
)

__all__ = ["WRITING_ERRORS", "discard_work", "new_directory", "new_file", "open_work", "reason"]
__all__ += ["wait_for_work", "work_of", "write_text"]

IDENTITY, LOCK = "run.json", "lock"
WRITING_ERRORS = (OSError, SafetensorError)  # safetensors has an error of its own for a full disk


@contextmanager
def open_work(
    out: Path, identity: Mapping[str, Any], *, resume: bool, restart: bool
) -> Iterator[Path]:
    """The folder `.<out's name>.work` beside `out`: new, or (`resume`) left by an earlier run.

    `identity` tells the run apart: base, data and settings. While the context is open no other
    process can have the folder; a process that is killed gives it up. Raises ExpertError when there
    is unfinished work and neither `resume` nor `restart` is asked for, another process is at it, or
    the folder can't be written; ConfigError when the work to resume has another identity. Of
    several processes of one training (`phatgoose.processes`) the first has it for all of them.
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
            if restart:
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
    except Timeout as problem:
        raise ExpertError(f"Another process is at work on {out}, in {work}.") from problem
    except WRITING_ERRORS as problem:
        raise ExpertError(f"{out} can't be written: {reason(problem)}.") from problem


def discard_work(out: Path) -> None:
    """Remove what a run that was killed between finishing `out` and tidying up left beside it."""
    shutil.rmtree(work_of(out), ignore_errors=True)


def wait_for_work(out: Path, seconds: float) -> None:
    """Come back when no process is at work on `out`, or after so many `seconds`.

    A process on another machine that has lost its connection takes a moment to notice.
    """
    lock = work_of(out) / LOCK
    if seconds > 0 and lock.exists():
        with suppress(Timeout), FileLock(lock).acquire(timeout=seconds):
            pass


def work_of(out: Path) -> Path:
    """The folder of the unfinished work on `out`."""
    return out.parent / f".{out.name}.work"


def _refuse_links(work: Path) -> None:
    """Raise ExpertError when `work` is a symbolic link or holds one: none of ours does."""
    for path in (work, *(work.rglob("*") if not work.is_symlink() else ())):
        if path.is_symlink():
            raise ExpertError(f"{path} is a symbolic link, which no unfinished work is; remove it.")


def _empty(work: Path) -> None:
    """Remove everything in `work` but its lock."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def new_directory(
    target: Path, error: type[PhatgooseError], *, overwrite: bool = False
) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the context ends well, and vanishes otherwise.

    With `overwrite` a `target` that exists is replaced, and kept if that fails. What runs that were
    killed left beside it goes. Raises `error` when it exists without `overwrite`, even if another
    process has just made it, and when something can't be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_left_overs(target)
        with temporary_folder(target) as work:
            yield work
            open_to_readers(work)
            if not (overwrite and target.exists()):
                os.rename(work, target)
                return
            with temporary_folder(target, REPLACED) as old:  # which brings it back if that fails
                os.rename(target, old / target.name)
                os.rename(work, target)
    except WRITING_ERRORS as problem:
        if not overwrite and target.exists():
            raise error(f"{target} exists already; choose another place.") from problem
        raise error(f"{target} can't be written: {reason(problem)}.") from problem


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary file that becomes `target` when the context ends well, and vanishes otherwise.

    Nothing is written through a link: the file is made anew under a name that can't be guessed, and
    a link in the place of `target` is replaced. What runs that were killed left beside it goes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_left_overs(target)
    with temporary_file(target) as unfinished:
        yield unfinished
        os.replace(unfinished, target)


def write_text(path: Path, content: str, error: type[PhatgooseError]) -> None:
    """Write `content` to `path`, complete or not at all, as `new_file` does. Raises `error`."""
    try:
        with new_file(path) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    except OSError as problem:
        raise error(f"{path} can't be written: {reason(problem)}.") from problem


def reason(problem: Exception) -> str:
    """Why something can't be written, in the system's words."""
    return str(getattr(problem, "strerror", None) or problem)
