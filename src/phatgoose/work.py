"""Writing so that what exists is complete: unfinished work and results renamed into place.

Unfinished folders stand beside their result and have names that start with a dot, so nothing takes
them for a finished one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, ExpertError, PhatgooseError

__all__ = ["new_directory", "open_work", "write_text"]

IDENTITY = "run.json"


def open_work(out: Path, identity: Mapping[str, Any], *, resume: bool, restart: bool) -> Path:
    """The folder `.<out's name>.work` beside `out`: new, or (`resume`) left by an earlier run.

    `identity` tells the run apart: base, data and settings. Raises ExpertError when there is
    unfinished work and neither `resume` nor `restart` is asked for, or the folder can't be written;
    ConfigError when the work to resume has another identity.
    """
    work = out.parent / f".{out.name}.work"
    file, content = work / IDENTITY, json.dumps(identity, indent=2)
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    if file.is_file():
        if not resume:
            raise ExpertError(
                f"Unfinished work was found in {work}; use resume to continue it or restart to "
                f"throw it away."
            )
        if file.read_text(encoding="utf-8") != content:
            raise ConfigError(
                f"The unfinished work in {work} had other settings, data or another base; repeat "
                f"them, or use restart to throw it away."
            )
        return work
    write_text(file, content, ExpertError)
    return work


@contextmanager
def new_directory(target: Path, error: type[PhatgooseError]) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the context ends well, and vanishes otherwise.

    A `target` that exists is replaced, and kept if that fails. Raises `error` when something can't
    be written.
    """
    work = old = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield work
        _open_to_readers(work)
        try:
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
                os.rename(target, old / target.name)
            os.rename(work, target)
        except BaseException:  # an interruption between the two renames must lose nothing either
            if old is not None and (old / target.name).exists():
                os.rename(old / target.name, target)
            raise
    except OSError as problem:
        raise error(f"{target} can't be written: {problem.strerror or problem}.") from problem
    finally:
        for folder in (work, old):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, content: str, error: type[PhatgooseError]) -> None:
    """Write `content` to `path`, complete or not at all. Raises `error` when it can't be done."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(content, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as problem:
        raise error(f"{path} can't be written: {problem.strerror or problem}.") from problem


def _open_to_readers(folder: Path) -> None:
    """Give a temporary folder and its files the modes that any new ones would have."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
