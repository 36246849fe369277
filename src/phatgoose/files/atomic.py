"""Write all or nothing: files and folders are made under temporary names and renamed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import PhatgooseError
from .left_overs import (
    REPLACED,
    clear_left_overs,
    is_there,
    open_to_readers,
    temporary_file,
    temporary_folder,
)
from .quoting import reason

__all__ = ["WRITING_ERRORS", "is_stream", "new_directory", "new_file", "require_free"]
__all__ += ["require_writable", "write_text"]

OPEN_FILES = re.compile(r"/dev/fd|/proc/[^/]+(/task/[^/]+)?/fd")  # folders of them
MOST_LINKS = 40
WRITING_ERRORS = (OSError, SafetensorError)  # safetensors has an error of its own for a full disk


@contextmanager
def new_directory(
    target: Path, error: type[PhatgooseError], *, overwrite: bool = False
) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the context ends well, and vanishes otherwise.

    With `overwrite` an existing `target` is replaced, and kept if that fails. Leftovers of killed
    runs are removed. Raises `error` when `target` exists without `overwrite`, even if another
    process has just made it, and when something can't be written.
    """
    told, target = target, _in_its_folder(target)
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
            with temporary_folder(target, REPLACED) as old:  # it restores `target` on failure
                os.rename(target, old / target.name)
                os.rename(work, target)
    except WRITING_ERRORS as problem:
        if not overwrite:
            require_free(told, error)
        raise error(f"{told} can't be written: {reason(problem)}.") from problem


def _in_its_folder(target: Path) -> Path:
    """`target` by a path that holds while it is renamed: ".." may lead through it, "." is it."""
    if target.name in ("", ".."):
        return target.resolve()
    return target.parent.resolve() / target.name


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary file that becomes `target` when the context ends well, and vanishes otherwise.

    Never writes through a link: the file is created under an unguessable name, and a link at
    `target` is replaced. Leftovers of killed runs are removed. Only what no file can replace, a
    pipe or a device such as /dev/stdout, is written into.
    """
    if is_stream(target):
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / target.name
            yield whole
            with whole.open("rb") as content, target.open("ab") as stream:
                shutil.copyfileobj(content, stream)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_left_overs(target)
    with temporary_file(target) as unfinished:
        yield unfinished
        os.replace(unfinished, target)


def is_stream(target: Path) -> bool:
    """True for what is neither a file nor a folder (a pipe, a device), and for open files by name.

    That is /dev/stdout and its like, wherever they lead, and links to all of these.
    """
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
    """Raise `error`, saying what to do `instead`, when something is at `target` already."""
    if is_there(target):
        raise error(f"{target} exists already; {instead}.")


def require_writable(target: Path, error: type[PhatgooseError]) -> None:
    """Raise `error` unless a file can be written at `target`, before the work whose result it is.

    Nothing is made; of folders that are to be made, the first that is there already is tried.
    """
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        if is_stream(target):
            return
        folder = next(each for each in target.absolute().parents if each.exists())
        with temporary_file(folder / target.name):
            pass
    except OSError as problem:
        raise error(f"{target} can't be written: {reason(problem)}.") from problem


def write_text(path: Path, content: str, error: type[PhatgooseError]) -> None:
    """Write `content` to `path` through `new_file`. Raises `error` when it can't be written."""
    try:
        with new_file(path) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    except OSError as problem:
        raise error(f"{path} can't be written: {reason(problem)}.") from problem
