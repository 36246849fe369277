"""Suites by name: the paper's, one's own (task files), and what a user can name to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, Field, PositiveInt

from ...config import TASK_FILES, closest
from ...entry_points import add_entry_points
from ...errors import TaskError
from ...files import read_table, reading, shortened
from ...names import HUB
from ..loading import FILES, default_name, load_task
from ..task import Entry, Example, Sources, Suite, Task, mix, refuse_twice
from . import bigbench, flan, t0

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
}
for _name in ("bbh", "bbl", "bbh-23", "bbl-24"):
    SUITES[_name] = SuiteRecord(partial(bigbench.suite, _name))


@cache  # looking for entry points takes a while
def known_suites() -> Mapping[str, SuiteRecord]:
    """All suites, with those of installed packages."""
    suites = dict(SUITES)
    add_entry_points(GROUP, suites, SuiteRecord)
    return suites


def open_suite(name_or_path: str | Path) -> Suite:
    """The suite of this name in `known_suites`, or the one in a folder, a task file or a TOML file.

    A known name wins over a folder ("./NAME"). A folder's visible task files (.jsonl, .json, .csv,
    .parquet) are its tasks, in alphabetical order. A TOML file has the keys `name` (default: the
    file's stem), `suffix` (appended to every input) and, for each task, a table `[[tasks]]` with
    `file` (relative to the TOML file) and optionally `name`, `metrics`, `max_new_tokens` and a
    `suffix` of its own.

    Entries read their files later. Raises TaskError, naming file and key, for anything else.
    """
    suites = known_suites()
    path = Path(name_or_path)
    folder = path.parent
    if isinstance(name_or_path, str) and name_or_path in suites:
        return suites[name_or_path].open()
    if path.suffix == ".toml":
        content = read_table(path, "Suite", TaskError)
    elif name_or_path and path.is_dir():
        folder = path
        tables = []
        for file in sorted(path.iterdir()):
            if file.suffix in TASK_FILES and not file.name.startswith("."):
                tables.append({"file": file.name})
        content = {"name": path.resolve().name, "tasks": tables}
    elif path.suffix in TASK_FILES and path.is_file():
        content = {"tasks": [{"file": path.name}]}
    else:
        raise TaskError(
            f"Suite {shortened(str(name_or_path))} is neither a known name ({', '.join(suites)}) "
            f"nor a folder of task files nor a .toml, {FILES}.{closest(name_or_path, suites)}"
        )
    with reading(f"Suite {path}", TaskError):
        table = _SuiteTable.model_validate(content)
    entries = [_entry(folder / task.file, task, table.suffix) for task in table.tasks]
    suite = Suite(table.name or path.stem, tuple(entries))
    refuse_twice("tasks", suite.names)
    return suite


def _entry(file: Path, table: _TaskTable, suffix: str) -> Entry:
    name = table.name or default_name(file)
    metrics = tuple(table.metrics)
    if table.suffix is not None:
        suffix = table.suffix

    def suffixed(examples: Iterable[Example]) -> tuple[Example, ...]:
        return tuple(replace(example, input=example.input + suffix) for example in examples)

    def read(_: Sources) -> Task:
        task = load_task(file, name=name)
        return replace(
            task,
            train=suffixed(task.train),
            validation=suffixed(task.validation),
            test=suffixed(task.test),
            metrics=metrics,
            max_new_tokens=table.max_new_tokens,
        )

    return Entry(name, read, metrics, table.max_new_tokens, source=str(file))


class _TaskTable(BaseModel, extra="forbid", strict=True):
    """One of a TOML file's [[tasks]]."""

    file: str
    name: str = ""
    metrics: list[str] = []
    max_new_tokens: PositiveInt | None = None
    suffix: str | None = None


class _SuiteTable(BaseModel, extra="forbid", strict=True):
    name: str = ""
    suffix: str = ""
    tasks: list[_TaskTable] = Field(min_length=1)


Origin = Literal["file", "copy", "hub"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)  # a mixture's is the last of its parts'


@dataclass(frozen=True)
class TrainingTask:
    """A dataset to train on that is not loaded yet.

    `named` is what a user writes for it alone, such as "t0hi/ag_news". Its data come from `origin`:
    a "file" of the user's own, a "copy" of a Hub dataset in `sources.data`, or the "hub" itself. A
    mixture has `parts`.
    """

    entry: Entry
    named: str
    origin: Origin
    sources: Sources
    parts: tuple[TrainingTask, ...] = ()

    @property
    def name(self) -> str:
        return self.entry.name

    def load(self) -> Task:
        return self.entry.read(self.sources)

    def portable(self) -> TrainingTask:
        """The same task for another machine; the content of files and of a mixture goes along."""
        if self.origin == "file" or self.parts:
            task = self.load()
            return replace(self, entry=replace(self.entry, read=lambda _: task))
        data = self.sources.data
        templates = self.sources.templates
        sources = Sources(data and data.absolute(), templates and templates.absolute())
        return replace(self, sources=sources)


def mixture(
    tasks: Sequence[TrainingTask], name: str, *, most: int | None = None, seed: int = 0
) -> TrainingTask:
    """`mix` of tasks that are not loaded yet: the paper's Multitask reference (section 4.2)."""
    total: int | None = 0
    for task in tasks:
        count = task.entry.train_examples
        if total is None or count is None:
            total = None
        else:
            total += count if most is None else min(count, most)
    entry = Entry(
        name,
        lambda _: mix([task.load() for task in tasks], name, most=most, seed=seed),
        train_examples=total,
        source=f"mixture of {len(tasks)} tasks",
    )
    origin = max((task.origin for task in tasks), key=ORIGINS.index, default=ORIGINS[0])
    return TrainingTask(entry, name, origin, Sources(), tuple(tasks))


def _read(name: str, template: str | None, choices: str | None, _: Sources) -> Task:
    return load_task(name, template=template, choices=choices)


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
    suites = known_suites()
    origin: Origin
    tasks = []
    for name in names:
        origin = "hub" if name.startswith(HUB) else "file"
        if origin == "hub" or name.endswith(TASK_FILES):
            read = partial(_read, name, template, choices)
            entry = Entry(default_name(name), read, source=name)
            tasks.append(TrainingTask(entry, name, origin, sources))
            continue
        if template or choices:
            raise TaskError(
                f"A template is for task files and hub:DATASET; {name} has prompts of its own."
            )
        parent, _, dataset = name.rpartition("/")
        is_one = parent in suites or parent.endswith(".toml")
        place = parent if is_one else name.rstrip("/")
        if place in suites:
            origin = "hub" if sources.data is None else "copy"
            if not suites[place].trainable:
                trainable = [suite for suite, record in suites.items() if record.trainable]
                raise TaskError(
                    f"Suite {place} is only for evaluation; to train on are {', '.join(trainable)}."
                )
        suite = open_suite(place)
        entries = [suite.entry(dataset)] if is_one else suite.entries
        for entry in entries:
            tasks.append(TrainingTask(entry, f"{place}/{entry.name}", origin, sources))
    return tasks
