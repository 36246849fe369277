"""Files of a stranger's folder: regular ones only, and none outside of it.

An expert may come from anywhere, so nothing outside its folder is read on its behalf: a symbolic
link must stay in the folder. In a Hub cache it may lead from a snapshot to the blobs of the same
repository, which is how huggingface_hub keeps files.
"""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from ..errors import ExpertError, PhatgooseError
from .quoting import reason

__all__ = ["refuse_pipes", "regular_file", "require_regular", "sha256_of"]

HASHED_AT_ONCE = 2**20


def regular_file(path: Path, error: type[PhatgooseError] = ExpertError) -> Path:
    """`path`, checked to be a regular file that lies in its own folder.

    Raises as `require_regular` does, and `error` for a symbolic link that leads out of the folder.
    """
    require_regular(path, error)
    place, folder = path.resolve(), path.parent.resolve()
    if not any(place.is_relative_to(known) for known in (folder, *_blobs_of(folder))):
        raise error(f"{path} is a symbolic link that leads out of its folder; copy the file there.")
    return path


def require_regular(path: Path, error: type[PhatgooseError], label: str | None = None) -> int:
    """The size of the file at `path`, which messages call `label`.

    Raises FileNotFoundError when there is none, `error` when it is something else: a folder, or a
    pipe or a device, which may never end.
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
    """Raise `error` where the folder `place`, which another library reads, holds pipes or devices.

    In it, or in a folder in it. Anything else than a folder is left to that library.
    """
    for path in (*Path(place).glob("*"), *Path(place).glob("*/*")):
        if path.is_fifo() or path.is_char_device():
            raise error(f"{path} is not a regular file.")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises ExpertError when it can't be read."""
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
