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

__all__ = ["regular_file", "sha256_of"]

HASHED_AT_ONCE = 2**20


def regular_file(path: Path, error: type[PhatgooseError] = ExpertError) -> Path:
    """`path`, checked to be a regular file that lies in its own folder.

    Raises FileNotFoundError when there is none, `error` when it is something else (a folder, a
    pipe, a device) or a symbolic link that leads out of the folder.
    """
    try:
        mode, place, folder = path.stat().st_mode, path.resolve(), path.parent.resolve()
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as problem:  # a loop of links, a name with a NUL
        raise error(f"{path} can't be read: {reason(problem)}.") from problem
    if not stat.S_ISREG(mode):
        raise error(f"{path} is not a regular file.")
    if not any(place.is_relative_to(known) for known in (folder, *_blobs_of(folder))):
        raise error(f"{path} is a symbolic link that leads out of its folder; copy the file there.")
    return path


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
