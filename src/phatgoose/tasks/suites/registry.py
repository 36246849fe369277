"""The suites that are known by name. A new one is a module with a function, and a record here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...config import TASK_FILES
from ...errors import TaskError
from ...files.quoting import shortened
from . import bigbench, flan, t0
from .entries import Suite
from .local import local_suite

__all__ = ["SUITES", "SuiteRecord", "open_suite"]


@dataclass(frozen=True)
class SuiteRecord:
    """How a known suite is opened, and whether experts may train on it.

    The suites to evaluate on are what experts must not have seen.
    """

    open: Callable[[], Suite]
    trainable: bool = False


SUITES: dict[str, SuiteRecord] = {
    "t0hi": SuiteRecord(t0.t0_held_in, trainable=True),
    "t0ho": SuiteRecord(t0.t0_held_out),
    "flan": SuiteRecord(flan.flan, trainable=True),
    "bbh": SuiteRecord(bigbench.bbh),
    "bbl": SuiteRecord(bigbench.bbl),
    "bbh-23": SuiteRecord(partial(bigbench.bbh, complete=True)),
    "bbl-24": SuiteRecord(partial(bigbench.bbl, complete=True)),
}


def open_suite(name_or_path: str | Path) -> Suite:
    """The suite of this name in SUITES, or the one in a folder of task files or a file.

    A known name takes precedence over a folder of that name; write "./NAME" for the folder. Raises
    TaskError for anything else, and as `local_suite` does.
    """
    if isinstance(name_or_path, str) and name_or_path in SUITES:
        return SUITES[name_or_path].open()
    if isinstance(name_or_path, str | Path):
        path = Path(name_or_path)
        if path.is_dir() or path.suffix in (".toml", *TASK_FILES):
            return local_suite(path)
    raise TaskError(
        f"Suite {shortened(name_or_path)} is neither a known name ({', '.join(SUITES)}) nor a "
        f"folder of task files nor a .toml, .jsonl or .csv file."
    )
