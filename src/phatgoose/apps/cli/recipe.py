"""Recipes: settings and tasks in a TOML file, one table for each class of settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import (
    PEFT_KINDS,
    TASK_FILES,
    Formatting,
    GateTraining,
    Routing,
    Serving,
    Training,
    from_mapping,
    require_one_of,
)
from ...errors import ConfigError
from ...files.quoting import shortened
from ...files.strict_toml import read_toml

__all__ = ["RECIPE_OPTIONS", "RECIPE_TABLES", "Recipe", "read_recipe"]


@dataclass(frozen=True)
class Recipe:
    """A TOML recipe: one table per config class, and the tasks to run it on.

    `peft` is the kind of expert to train, a name in PEFT_KINDS. `data` and `templates` are the
    folders of `tasks.suites.entries.Sources`.
    """

    base: str | None = None
    tasks: tuple[str, ...] = ()
    peft: str | None = None
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Path | None = None
    templates: Path | None = None


RECIPE_TABLES = {
    **PEFT_KINDS,
    "training": Training,
    "gates": GateTraining,
    "formatting": Formatting,
    "routing": Routing,
    "serving": Serving,
}
FOLDERS = ("data", "templates")
MODELS = ("embedder", "retrieval_embedder")  # settings that are a folder or a Hub id
EMBEDDED = "smollm2"  # a base that is no folder; base.smollm2 loads torch
RECIPE_OPTIONS = frozenset({"base", "tasks", "peft", *FOLDERS})  # what stands above the tables


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in the TOML file `path`; paths in it are relative to the file.

    A task that begins with the name of a known suite is no path ("./NAME" is the folder). A base or
    an embedder is a path where there is such a folder, and else a name as on the command line.
    Raises ConfigError when the file is missing, isn't TOML or has unknown keys.
    """
    path = Path(path)
    content = read_toml(path, "Recipe", ConfigError)
    known = {*RECIPE_OPTIONS, *RECIPE_TABLES}
    for key in content:
        if key not in known:
            raise ConfigError(
                f"{path}: unknown key {shortened(key)}; known are {', '.join(sorted(known))}."
            )
    tables = {key: _table(path, content, key) for key in RECIPE_TABLES if key in content}
    base, tasks = content.get("base"), content.get("tasks", [])
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: base is {shortened(base)}, but must be a Hub id or a path.")
    if not (isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)):
        raise ConfigError(f"{path}: tasks must be a list of file names, suites or Hub ids.")
    base = base if base is None else _model(path.parent, base)
    peft = content.get("peft")
    require_one_of([None, *PEFT_KINDS], f"{path}: peft", peft)
    tasks = tuple(_relative_to(path.parent, task) for task in tasks)
    return Recipe(base, tasks, peft, tables, *(_folder(path, content, key) for key in FOLDERS))


def _table(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The settings in the recipe's table `key`."""
    table = content[key]
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {key} must be a table, such as [{key}].")
    from_mapping(RECIPE_TABLES[key], table, f"{path}, [{key}]")
    named = {name: _model(path.parent, table[name]) for name in MODELS if name in table}
    return {**table, **named}


def _folder(path: Path, content: Mapping[str, Any], key: str) -> Path | None:
    """The folder that the recipe names, None when it names none."""
    value = content.get(key)
    if not isinstance(value, str | None):
        raise ConfigError(f"{path}: {key} is {shortened(value)}, but must be a folder.")
    return None if value is None else path.parent / value


def _model(folder: Path, name: str) -> str:
    """The model `name` in `folder`, or `name` as it is where no such folder is there."""
    found = folder / name
    elsewhere = found != Path(name) and name not in ("", EMBEDDED)
    return str(found) if elsewhere and os.path.isdir(found) else name


def _relative_to(folder: Path, task: str) -> str:
    """`task` as it is when it names a suite or a Hub dataset or is absolute, else in `folder`."""
    from ...tasks.suites.registry import SUITES  # loads numpy, which reading settings needn't

    def in_suite(name: str) -> bool:
        return name.split("/")[0] in SUITES and not name.endswith(TASK_FILES)

    path = str(folder / task)
    if in_suite(task) or task.startswith("hub:"):
        return task
    return os.path.join(os.curdir, path) if in_suite(path) else path
