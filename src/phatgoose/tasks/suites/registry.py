"""Suites: the paper's lists of datasets to train and evaluate on, and one's own.

entries.py       Entry, Suite, Sources: datasets that are not loaded yet, and where their files are
hub.py           rows of a dataset from the Hub, or from a local copy of its files
promptsource.py  P3's prompt templates
t0.py            t0hi, t0ho: T0's held-in and held-out datasets in P3's prompts
flan.py          flan: 166 datasets, T0 held-in among them
bigbench.py      bbh, bbl: what the released code evaluates; bbh-23, bbl-24: what the paper counts
local.py         a folder of task files, or a TOML file that lists them
sources.py       what may be named to train on: suites, parts of them, files

The lists stand in TOML files of the same names. Nothing is downloaded or read before an entry is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...errors import TaskError
from . import bigbench, flan, t0
from .entries import Entry, Sources, Suite
from .local import local_suite

__all__ = ["SUITES", "Entry", "Sources", "Suite", "open_suite"]

SUITES: dict[str, Callable[[], Suite]] = {
    "t0hi": t0.t0_held_in,
    "t0ho": t0.t0_held_out,
    "flan": flan.flan,
    "bbh": bigbench.bbh,
    "bbl": bigbench.bbl,
    "bbh-23": partial(bigbench.bbh, complete=True),
    "bbl-24": partial(bigbench.bbl, complete=True),
}


def open_suite(name_or_path: str | Path) -> Suite:
    """The suite called so in SUITES, or the one in a folder of task files or a .toml file.

    A known name comes before a folder of that name; write "./NAME" for the folder. Raises TaskError
    for anything else, and as `local_suite` does.
    """
    if isinstance(name_or_path, str) and name_or_path in SUITES:
        return SUITES[name_or_path]()
    path = Path(name_or_path)
    if path.is_dir() or path.suffix == ".toml":
        return local_suite(path)
    raise TaskError(
        f"Suite {str(name_or_path)!r} is neither a known name ({', '.join(SUITES)}) nor a folder "
        f"of task files nor a .toml file."
    )
