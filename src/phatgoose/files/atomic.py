"""Files and folders that appear whole or not at all, and what interrupted writing left."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import PhatgooseError
from .strict import reason


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
