"""What may be named to train on: a suite, one dataset of it, a task file, a dataset of the Hub.

The paper's pools have 36 and 166 datasets, so that nothing is loaded before its training begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...config import TASK_FILES
from ...errors import TaskError
from ..task import Task, default_name, load_task, mix
from .entries import Entry, Sources, Suite
from .registry import SUITES, open_suite

__all__ = ["Place", "Sources", "TrainingTask", "mixture", "open_tasks"]

TRAINABLE = ("t0hi", "flan")  # the other known suites are what experts must not have seen
HUB = "hub:"

Place = Literal["file", "copy", "hub"]


@dataclass(frozen=True)
class TrainingTask:
    """A dataset to train on that is not loaded yet.

    `named` is what a user writes for it alone, such as "t0hi/ag_news". Its data are at `place`: a
    "file" of the user's own, a "copy" of a Hub dataset in `places.data`, or the "hub" itself.
    """

    entry: Entry
    named: str
    place: Place
    places: Sources

    @property
    def name(self) -> str:
        """The task's name, and that of its expert."""
        return self.entry.name

    def load(self) -> Task:
        """The task, loaded anew at each call. Raises TaskError when it can't be."""
        return self.entry.read(self.places)

    def portable(self) -> TrainingTask:
        """The same task for another machine: a file of the user's own is read here and comes along.

        Copies and datasets of the Hub are for that machine to read.
        """
        if self.place == "file":
            task = self.load()
            return replace(self, entry=replace(self.entry, read=lambda _: task))
        folders = [
            folder and folder.absolute() for folder in (self.places.data, self.places.templates)
        ]
        return replace(self, places=Sources(*folders))


def open_tasks(
    sources: Sequence[str],
    places: Sources | None = None,
    *,
    template: str | None = None,
    choices: str | None = None,
) -> list[TrainingTask]:
    """The datasets that `sources` name, in order; nothing is loaded.

    A source is a suite (t0hi, flan, a suite file .toml, a folder of task files), which means all
    its datasets, one dataset of such (`t0hi/ag_news`, `mine.toml/reviews`), a task file (.jsonl,
    .csv) or `hub:DATASET`. `template` and `choices`, as in `load_task`, are for the latter two.

    Raises TaskError for a source that is none of these, an unknown dataset, a suite to evaluate on
    only, a file that doesn't exist, and templates where nothing uses them.
    """
    places = places or Sources()
    tasks: list[TrainingTask] = []
    for source in sources:
        if source.startswith(HUB) or source.endswith(TASK_FILES):
            tasks.append(_single(source, places, template, choices))
        elif template or choices:
            raise TaskError(
                f"A template is for task files and hub:DATASET; {source} has prompts of its own."
            )
        else:
            tasks += _of_suite(source, places)
    return tasks


def mixture(
    tasks: Sequence[TrainingTask], name: str, *, most: int | None = None, seed: int = 0
) -> TrainingTask:
    """All `tasks` as one, for the Multitask model; see `task.mix`.

    When it is loaded, all of them are in memory at once.
    """
    counts = [task.entry.train_examples for task in tasks]
    known = [count if most is None else min(count, most) for count in counts if count is not None]
    places = {task.place for task in tasks}
    entry = Entry(
        name,
        lambda _: mix([task.load() for task in tasks], name, most=most, seed=seed),
        train_examples=sum(known) if len(known) == len(tasks) else None,
        source=f"mixture of {len(tasks)} tasks",
    )
    place: Place = "hub" if "hub" in places else "copy" if "copy" in places else "file"
    return TrainingTask(entry, name, place, Sources())


def _single(
    source: str, places: Sources, template: str | None, choices: str | None
) -> TrainingTask:
    """The task of a file or of the Hub."""
    place: Place = "hub" if source.startswith(HUB) else "file"
    if place == "file" and not Path(source).is_file():
        raise TaskError(f"Task file {source} does not exist.")
    entry = Entry(
        default_name(source),
        lambda _: load_task(source, template=template, choices=choices),
        source=source,
    )
    return TrainingTask(entry, source, place, places)


def _of_suite(source: str, places: Sources) -> list[TrainingTask]:
    """The tasks of a suite, or of one dataset of it."""
    whole, _, name = source.rpartition("/")
    if whole in SUITES or whole.endswith(".toml"):
        suite, known = _suite(whole), whole
        entries: tuple[Entry, ...] = (suite.entry(name),)
    else:
        suite, known = _suite(source), source.rstrip("/")
        entries = suite.entries
    hub: Place = "hub" if places.data is None else "copy"
    place: Place = hub if known in SUITES else "file"
    return [TrainingTask(entry, f"{known}/{entry.name}", place, places) for entry in entries]


def _suite(name: str) -> Suite:
    if name in SUITES and name not in TRAINABLE:
        raise TaskError(
            f"Suite {name} is there to evaluate on, not to train on; known to train on are "
            f"{', '.join(TRAINABLE)}."
        )
    is_local = name.endswith(".toml") or (name and Path(name).is_dir())
    if name not in SUITES and not is_local:
        raise TaskError(
            f"{name!r} is nothing to train on; wanted a task file (.jsonl, .csv), hub:DATASET, "
            f"{' or '.join(TRAINABLE)}, one of their datasets such as {TRAINABLE[0]}/ag_news, a "
            f"suite file (.toml) or a folder of task files."
        )
    return open_suite(name)
