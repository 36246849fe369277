"""Unfinished work: a folder beside the result, which knows what it belongs to.

Nothing in it is ever taken for a finished expert: its name starts with a dot, and results are
renamed out of it when they are complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, ExpertError

__all__ = ["open_work"]

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
    try:
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ExpertError(f"{work} can't be written: {error.strerror}.") from error
    return work
