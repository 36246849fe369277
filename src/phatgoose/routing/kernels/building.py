"""Compiling a C++ library on this machine, and caching it where only its user can write.

A loaded library has all rights of its user. So one is taken from the cache only if it is in a
folder of the user's that others can't enter, is a file of the user's that others can't write to,
and has the SHA-256 that its name ends with; and the file that was checked is the one loaded,
whatever its name leads to by then. A damaged one is rebuilt. Where the cache is not private, the
library is built for this process alone, in a temporary folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import secrets
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...files.user_cache import user_cache
from .shipped import LINKED, OPTIMISED

__all__ = ["FLAGS", "MORE_FLAGS", "load_built"]

logger = logging.getLogger(__name__)

FLAGS = (*OPTIMISED, "-march=native", "-fopenmp")
MORE_FLAGS = "PHATGOOSE_NATIVE_FLAGS"  # in the environment: for sanitizers (docs/reliability.md)
SECONDS = 120  # for the compiler
OF_OTHERS, WRITABLE = 0o077, 0o022  # what group and others may do: anything, write
OPEN_FILES = Path("/proc/self/fd")  # where an open file has a name of its own
# What an open must not do, where the system knows it: follow links, stay open in other programs.
CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def load_built(source: Path) -> ctypes.CDLL:
    """The library of the C++ file `source`, from the user's cache, or built now and kept there.

    Raises OSError or SubprocessError, whose text is one line, when there is no compiler or it fails
    and when nothing built can be loaded.
    """
    command = os.environ.get("CXX") or "c++"
    compiler = shutil.which(command)
    if compiler is None:
        raise FileNotFoundError(f"there is no C++ compiler, {command!r}")
    more = shlex.split(os.environ.get(MORE_FLAGS, ""))
    macros = _run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    compiling, linking = (*FLAGS, *more, "-c"), (*LINKED, *_named_openmp(macros), *more)
    content = source.read_bytes() + macros + " ".join((compiler, *compiling, *linking)).encode()
    begin = f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}"
    with _cache() as cache:
        library = None if cache is None else _from(cache, begin)
        if library is not None:
            return library
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            built, compiled = Path(work) / f"{begin}.so", str(Path(work) / f"{begin}.o")
            _run(compiler, *compiling, "-o", compiled, str(source), folder=work)
            _run(compiler, *linking, "-o", str(built), compiled, folder=work)
            if cache:
                with suppress(OSError):  # a full disk, say
                    return _loaded(_keep(built.read_bytes(), cache, begin), cache)
            return _loaded(str(built))


def _named_openmp(macros: bytes) -> tuple[str, ...]:
    """What makes a library name the OpenMP of the compiler that has these `macros`.

    Nothing where GNU's or one like it is loaded for all already, which is torch's (`shipped`).
    """
    is_there = hasattr(ctypes.pythonapi, "GOMP_parallel")
    return () if is_there and b"__clang__" not in macros else ("-fopenmp",)


@dataclass(frozen=True)
class Cache:
    """The user's private folder of libraries at `place`, open as `folder`."""

    place: Path
    folder: int


@contextmanager
def _cache() -> Iterator[Cache | None]:
    """The cache while the context is open; None, and one line, where there can't be one."""
    folder = None
    try:
        place = user_cache() / "native"
        folder = _own_folder(place)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where ~ is
        logger.warning("The native kernel is built for this process alone: %s.", error)
    try:
        yield None if folder is None else Cache(place, folder)
    finally:
        if folder is not None:
            os.close(folder)


def _own_folder(place: Path) -> int:
    """The folder `place`, made if need be, open. Raises OSError unless it is the user's alone."""
    if not place.is_absolute():
        raise OSError(f"{place}, where it would be kept, is no absolute path")
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    folder = os.open(place, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | CAREFULLY)
    info = os.fstat(folder)
    if not _is_own(info) or info.st_mode & OF_OTHERS:
        os.close(folder)
        raise PermissionError(
            f"{place}, where it would be kept, must be yours and open to nobody else (chmod 700)"
        )
    return folder


def _from(cache: Cache, begin: str) -> ctypes.CDLL | None:
    """The library in the cache whose name begins so, None if there is none; damaged ones go."""
    for name in os.listdir(cache.folder):
        if name.startswith(f"{begin}-"):
            with suppress(OSError):
                return _loaded(name, cache)
            with suppress(OSError):
                os.unlink(name, dir_fd=cache.folder)
    return None


def _keep(content: bytes, cache: Cache, begin: str) -> str:
    """The name in the cache of a library of this `content`, which is there then, complete."""
    name = f"{begin}-{hashlib.sha256(content).hexdigest()}.so"
    unfinished, folder = f".{secrets.token_hex(8)}", cache.folder
    new = os.open(
        unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | CAREFULLY, 0o600, dir_fd=folder
    )
    try:
        with open(new, "wb") as file:
            file.write(content)
        os.rename(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(unfinished, dir_fd=folder)
        raise
    return name


def _loaded(name: str, cache: Cache | None = None) -> ctypes.CDLL:
    """The library `name`: in the cache, of the content that its name tells, or one just built.

    Raises OSError when it isn't what it should be, or can't be loaded.
    """
    file = os.open(name, os.O_RDONLY | CAREFULLY, dir_fd=cache.folder if cache else None)
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or not _is_own(info) or info.st_mode & WRITABLE:
            raise PermissionError(f"{name} is no file of yours that nobody else can write to")
        with open(file, "rb", closefd=False) as opened:
            found = hashlib.sha256(opened.read()).hexdigest()
        if cache and not name.endswith(f"-{found}.so"):
            raise OSError(f"{name} is damaged")
        place = OPEN_FILES / str(file)
        if not place.exists():
            place = cache.place / name if cache else Path(name)
        library = ctypes.CDLL(str(place))
    except BaseException:
        os.close(file)
        raise
    return library  # its file stays open: the loader knows libraries by their names, /proc's too


def _is_own(info: os.stat_result) -> bool:
    """True for what belongs to this process's user; systems without such owners have no others."""
    return not hasattr(os, "geteuid") or info.st_uid == os.geteuid()


def _run(*command: str, folder: str | None = None) -> bytes:
    """What `command` writes; its own temporary files go to `folder`, and no file is others' to see.

    Raises OSError, with the first line of its complaint, or SubprocessError.
    """
    environment = os.environ if folder is None else {**os.environ, "TMPDIR": folder}
    mask = 0o077 if hasattr(os, "geteuid") else -1
    try:
        return subprocess.run(
            command, check=True, capture_output=True, timeout=SECONDS, env=environment, umask=mask
        ).stdout
    except subprocess.CalledProcessError as error:
        complaint = error.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise OSError(f"{command[0]} failed: {complaint or error.returncode}") from error
