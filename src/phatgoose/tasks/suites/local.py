"""One's own suites: a folder of task files, or a TOML file that lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config import TASK_FILES
from ...errors import TaskError
from ...files.quoting import shortened
from ...files.strict_toml import read_toml
from ..loading import SPLITS, check_task_name, load_task
from ..task import Task
from .entries import Entry, Sources, Suite

__all__ = ["local_suite"]

SUITE_KEYS = ("name", "suffix", "tasks")
TASK_KEYS = ("file", "name", "metrics", "max_new_tokens", "suffix")


def local_suite(path: str | Path) -> Suite:
    """The suite in `path`: a folder of task files, one such file, or a TOML file.

    A folder's .jsonl and .csv files, hidden ones aside, are its tasks, in alphabetical order, and
    its name is the suite's. A TOML file has the keys `name` (default: the file's stem), `suffix`
    (text appended to every input) and, for each task, a table `[[tasks]]` with `file` (relative to
    the TOML file) and optionally `name`, `metrics`, `max_new_tokens` and a `suffix` of its own.

    An entry reads its task file when it is read itself. Raises TaskError, naming file and key, for
    a path that is neither, a suite without tasks, a task file that doesn't exist, an unknown key, a
    value of the wrong type, a name that is empty or no UTF-8, or two tasks with one name.
    Evaluation checks that the metrics exist.
    """
    path = Path(path)
    if path.suffix in TASK_FILES and not path.is_dir():
        if not path.is_file():
            raise TaskError(f"Task file {path} does not exist.")
        suite = Suite(path.stem, (_entry(path, path.stem),))
    else:
        suite = _folder_suite(path) if path.is_dir() else _toml_suite(path)
    if not suite.entries:
        raise TaskError(f"{path} has no tasks; wanted .jsonl or .csv files, or [[tasks]] in TOML.")
    for name in (suite.name, *suite.names):
        check_task_name(name)
    for name, count in Counter(suite.names).items():
        if count > 1:
            raise TaskError(
                f"{path}: {count} tasks are called {name!r}; give them different names."
            )
    return suite


def _entry(
    file: Path,
    name: str,
    metrics: tuple[str, ...] = (),
    max_new_tokens: int | None = None,
    suffix: str = "",
) -> Entry:
    """The entry of one task file; `suffix` is appended to every input."""

    def read(_: Sources) -> Task:
        task = load_task(file, name=name)
        splits: dict[str, Any] = {
            split: tuple(replace(each, input=each.input + suffix) for each in getattr(task, split))
            for split in SPLITS
        }
        return replace(task, **splits, metrics=metrics, max_new_tokens=max_new_tokens)

    return Entry(name, read, metrics, max_new_tokens, source=str(file))


def _folder_suite(folder: Path) -> Suite:
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in TASK_FILES and not file.name.startswith(".")
    )
    return Suite(folder.resolve().name, tuple(_entry(file, file.stem) for file in files))


def _toml_suite(path: Path) -> Suite:
    if path.suffix != ".toml":
        raise TaskError(
            f"Suite {path} must be a folder of task files, one of them, or a .toml file."
        )
    content = read_toml(path, "Suite", TaskError)
    _require_known(content, SUITE_KEYS, str(path))
    name = _name(content, str(path), path.stem)
    suffix = _text(content, "suffix", str(path), "")
    tables = content.get("tasks", [])
    if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise TaskError(f"{path}: tasks must be tables, each headed [[tasks]].")
    return Suite(
        name,
        tuple(
            _listed_entry(table, f"{path}, task {number}", path.parent, suffix)
            for number, table in enumerate(tables, 1)
        ),
    )


def _listed_entry(table: Mapping[str, Any], where: str, folder: Path, suffix: str) -> Entry:
    """The entry of one table [[tasks]], checked."""
    _require_known(table, TASK_KEYS, where)
    file = folder / _text(table, "file", where)
    if file.suffix not in TASK_FILES:
        raise TaskError(f"{where}: file is {file}, but must be a .jsonl or .csv file.")
    if not file.is_file():
        raise TaskError(f"{where}: file {file} does not exist.")
    metrics = table.get("metrics", [])
    if not (isinstance(metrics, list) and all(isinstance(metric, str) for metric in metrics)):
        raise TaskError(
            f'{where}: metrics is {shortened(metrics)}, but must be a list such as ["accuracy"].'
        )
    most = table.get("max_new_tokens")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise TaskError(
            f"{where}: max_new_tokens is {shortened(most)}, but must be a whole number above 0."
        )
    return _entry(
        file,
        _name(table, where, file.stem),
        tuple(metrics),
        most,
        _text(table, "suffix", where, suffix),
    )


def _require_known(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise TaskError(f"{where}: unknown key {shortened(key)}; known are {', '.join(known)}.")


def _name(table: Mapping[str, Any], where: str, default: str) -> str:
    name = _text(table, "name", where, default)
    if not name:
        raise TaskError(f"{where}: name is empty; give one, or leave the key out for {default!r}.")
    return name


def _text(table: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = table.get(key, default)
    if value is None:
        raise TaskError(f"{where}: {key} is missing.")
    if not isinstance(value, str):
        raise TaskError(f"{where}: {key} is {shortened(value)}, but must be a text.")
    return value
