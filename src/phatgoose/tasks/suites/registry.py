"""Suites by name: the paper's, one's own (task files), and what a user can name to train on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from ...config import TASK_FILES, Training, closest
from ...errors import TaskError
from ...files import add_entry_points, read_toml, shortened
from ..loading import FILES, SPLITS, check_task_name, default_name, load_task
from ..task import Entry, Sources, Suite, Task, mix
from . import bigbench, flan, t0

SUITE_KEYS = ("name", "suffix", "tasks")
TASK_KEYS = ("file", "name", "metrics", "max_new_tokens", "suffix")


def local_suite(path: str | Path) -> Suite:
    """The suite in `path`: a folder of task files, one such file, or a TOML file.

    A folder's visible task files (.jsonl, .json, .csv, .parquet) are its tasks, in alphabetical
    order. A TOML file has the keys `name` (default: the file's stem), `suffix` (appended to every
    input) and, for each task, a table `[[tasks]]` with `file` (relative to the TOML file) and
    optionally `name`, `metrics`, `max_new_tokens` and a `suffix` of its own.

    Entries read their files later. Raises TaskError, naming file and key, for anything else.
    """
    path = Path(path)
    if path.suffix in TASK_FILES and not path.is_dir():
        if not path.is_file():
            raise TaskError(f"Task file {path} does not exist.")
        suite = Suite(path.stem, (_entry(path, path.stem),))
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in TASK_FILES and f.name[0] != ".")
        suite = Suite(path.resolve().name, tuple(_entry(file, file.stem) for file in files))
    else:
        suite = _toml_suite(path)
    if not suite.entries:
        raise TaskError(f"{path} has no tasks; wanted a {FILES}, or [[tasks]] in TOML.")
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
    def read(_: Sources) -> Task:
        task = load_task(file, name=name)
        splits: dict[str, Any] = {
            split: tuple(replace(each, input=each.input + suffix) for each in getattr(task, split))
            for split in SPLITS
        }
        return replace(task, **splits, metrics=metrics, max_new_tokens=max_new_tokens)

    return Entry(name, read, metrics, max_new_tokens, source=str(file))


def _toml_suite(path: Path) -> Suite:
    if path.suffix != ".toml":
        raise TaskError(
            f"Suite {path} must be a folder of task files, one of them, or a .toml file."
        )
    content = read_toml(path, "Suite", TaskError)
    _require_known(content, SUITE_KEYS, str(path))
    name = _text(content, "name", str(path), path.stem)
    suffix = _text(content, "suffix", str(path), "")
    tables = content.get("tasks", [])
    if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise TaskError(f"{path}: tasks must be tables, each headed [[tasks]].")
    entries = (
        _listed_entry(table, f"{path}, task {number}", path.parent, suffix)
        for number, table in enumerate(tables, 1)
    )
    return Suite(name, tuple(entries))


def _listed_entry(table: Mapping[str, Any], where: str, folder: Path, suffix: str) -> Entry:
    _require_known(table, TASK_KEYS, where)
    file = folder / _text(table, "file", where)
    if file.suffix not in TASK_FILES:
        raise TaskError(f"{where}: file is {file}, but must be a {FILES}.")
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
    name = _text(table, "name", where, file.stem)
    return _entry(file, name, tuple(metrics), most, _text(table, "suffix", where, suffix))


def _require_known(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise TaskError(f"{where}: unknown key {shortened(key)}; known are {', '.join(known)}.")


def _text(table: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = table.get(key, default)
    if value is None:
        raise TaskError(f"{where}: {key} is missing.")
    if not isinstance(value, str):
        raise TaskError(f"{where}: {key} is {shortened(value)}, but must be a text.")
    if key == "name" and not value:
        raise TaskError(f"{where}: name is empty; give one, or leave the key out for {default!r}.")
    return value


# A new suite is a module with a function, and a record here.


@dataclass(frozen=True)
class SuiteRecord:
    """How a known suite is opened, and whether experts may train on it."""

    open: Callable[[], Suite]
    trainable: bool = False


GROUP = "phatgoose.suites"  # of entry points, each of which is a SuiteRecord

SUITES: dict[str, SuiteRecord] = {
    "t0hi": SuiteRecord(t0.t0_held_in, trainable=True),
    "t0ho": SuiteRecord(t0.t0_held_out),
    "flan": SuiteRecord(flan.flan, trainable=True),
    "bbh": SuiteRecord(bigbench.bbh),
    "bbl": SuiteRecord(bigbench.bbl),
    "bbh-23": SuiteRecord(partial(bigbench.bbh, complete=True)),
    "bbl-24": SuiteRecord(partial(bigbench.bbl, complete=True)),
}


@cache  # looking for entry points takes a while, and adds them to SUITES once
def known_suites() -> Mapping[str, SuiteRecord]:
    """All suites, with those of installed packages."""
    add_entry_points(GROUP, SUITES, SuiteRecord)
    return SUITES


def open_suite(name_or_path: str | Path) -> Suite:
    """The suite of this name in `known_suites`, or the one in a folder of task files or a file.

    A known name wins over a folder ("./NAME"). Raises TaskError for anything else.
    """
    if isinstance(name_or_path, str) and name_or_path in known_suites():
        return known_suites()[name_or_path].open()
    if isinstance(name_or_path, str | Path):
        path = Path(name_or_path)
        if path.is_dir() or path.suffix in (".toml", *TASK_FILES):
            return local_suite(path)
    known = ", ".join(known_suites())
    raise TaskError(
        f"Suite {shortened(name_or_path)} is neither a known name ({known}) nor a folder of task "
        f"files nor a .toml, {FILES}.{closest(name_or_path, known_suites())}"
    )


HUB = "hub:"

Origin = Literal["file", "copy", "hub"]


@dataclass(frozen=True)
class TrainingTask:
    """A dataset to train on that is not loaded yet.

    `named` is what a user writes for it alone, such as "t0hi/ag_news". Its data come from `origin`:
    a "file" of the user's own, a "copy" of a Hub dataset in `sources.data`, or the "hub" itself.
    """

    entry: Entry
    named: str
    origin: Origin
    sources: Sources

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def places(self) -> list[str]:
        """What names it in any folder: `named`, with the whole path of what is a file here."""
        if self.origin != "file":
            return [self.named]
        suite, name = os.path.split(self.named)
        if suite.endswith(".toml"):
            return [os.path.join(os.path.abspath(suite), name)]
        return [os.path.abspath(self.entry.source)]

    def settings(self, training: Training) -> Training:
        most = self.entry.micro_batch_size
        return training if most is None else replace(training, micro_batch_size=most)

    def without_micro_batch(self) -> TrainingTask:
        return replace(self, entry=replace(self.entry, micro_batch_size=None))

    def load(self) -> Task:
        return self.entry.read(self.sources)

    def portable(self) -> TrainingTask:
        """The same task for another machine; the content of a user's own file travels with it."""
        if self.origin == "file":
            task = self.load()
            return replace(self, entry=replace(self.entry, read=lambda _: task))
        places = (self.sources.data, self.sources.templates)
        return replace(self, sources=Sources(*(each and each.absolute() for each in places)))


def mixture(
    tasks: Sequence[TrainingTask], name: str, *, most: int | None = None, seed: int = 0
) -> TrainingTask:
    """`mix` of tasks that are not loaded yet: the paper's Multitask reference (section 4.2)."""
    counts = [task.entry.train_examples for task in tasks]
    known = [count if most is None else min(count, most) for count in counts if count is not None]
    origins = {task.origin for task in tasks}
    entry = Entry(
        name,
        lambda _: mix([task.load() for task in tasks], name, most=most, seed=seed),
        train_examples=sum(known) if len(known) == len(tasks) else None,
        source=f"mixture of {len(tasks)} tasks",
    )
    origin: Origin = "hub" if "hub" in origins else "copy" if "copy" in origins else "file"
    return _Mixture(entry, name, origin, Sources(), tuple(tasks), most, seed)


@dataclass(frozen=True)
class _Mixture(TrainingTask):
    tasks: tuple[TrainingTask, ...]
    most: int | None
    seed: int

    @property
    def places(self) -> list[str]:
        return [place for task in self.tasks for place in task.places]

    def portable(self) -> TrainingTask:
        tasks = [task.portable() for task in self.tasks]
        return mixture(tasks, self.name, most=self.most, seed=self.seed)


def open_tasks(
    names: Sequence[str],
    sources: Sources | None = None,
    *,
    template: str | None = None,
    choices: str | None = None,
) -> list[TrainingTask]:
    """The datasets that `names` stand for, in order; nothing is loaded.

    A name is a suite (t0hi, flan, a suite file .toml, a folder of task files), which means all its
    datasets, one dataset of a suite (`t0hi/ag_news`, `mine.toml/reviews`), a task file or
    `hub:DATASET`. `template` and `choices`, as in `load_task`, are for the latter two.
    Raises TaskError for anything else, and for a suite to evaluate on only.
    """
    sources = sources or Sources()
    tasks: list[TrainingTask] = []
    for name in names:
        if name.startswith(HUB) or name.endswith(TASK_FILES):
            tasks.append(_single(name, sources, template, choices))
        elif template or choices:
            raise TaskError(
                f"A template is for task files and hub:DATASET; {name} has prompts of its own."
            )
        else:
            tasks += _of_suite(name, sources)
    return tasks


def _single(name: str, sources: Sources, template: str | None, choices: str | None) -> TrainingTask:
    origin: Origin = "hub" if name.startswith(HUB) else "file"
    if origin == "file" and not Path(name).is_file():
        raise TaskError(f"Task file {name} does not exist.")
    read = partial(load_task, name, template=template, choices=choices)
    return TrainingTask(
        Entry(default_name(name), lambda _: read(), source=name), name, origin, sources
    )


def _of_suite(name: str, sources: Sources) -> list[TrainingTask]:
    whole, _, dataset = name.rpartition("/")
    if whole in known_suites() or whole.endswith(".toml"):
        suite = whole
        entries: tuple[Entry, ...] = (_trainable(suite).entry(dataset),)
    else:
        suite = name.rstrip("/")
        entries = _trainable(name).entries
    hub: Origin = "hub" if sources.data is None else "copy"
    origin: Origin = hub if suite in known_suites() else "file"
    return [TrainingTask(entry, f"{suite}/{entry.name}", origin, sources) for entry in entries]


def _trainable(name: str) -> Suite:
    trainable = [known for known, record in known_suites().items() if record.trainable]
    if name in SUITES and name not in trainable:
        raise TaskError(
            f"Suite {name} is only for evaluation; suites to train on are {', '.join(trainable)}."
        )
    is_local = name.endswith(".toml") or (name and Path(name).is_dir())
    if name not in SUITES and not is_local:
        raise TaskError(
            f"{name!r} can't be trained on; wanted a task file, hub:DATASET, "
            f"{' or '.join(trainable)}, one of their datasets such as {trainable[0]}/ag_news, a "
            f"suite file (.toml) or a folder of task files.{closest(name, trainable)}"
        )
    return open_suite(name)
