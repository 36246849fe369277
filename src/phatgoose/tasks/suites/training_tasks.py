"""What a user can name to train on: a suite, one of its datasets, a task file, a Hub dataset.

The paper's pools have 36 and 166 datasets, so each is loaded only when its training begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...config import TASK_FILES, Training
from ...errors import TaskError
from ..loading import default_name, load_task
from ..task import Task
from .entries import Entry, Sources, Suite
from .registry import SUITES, open_suite

__all__ = ["Origin", "TrainingTask", "open_tasks"]

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
        """The task's name, and that of its expert."""
        return self.entry.name

    def settings(self, training: Training) -> Training:
        """`training` for this task: with the micro-batch that its suite names for it, if any."""
        most = self.entry.micro_batch_size
        return training if most is None else replace(training, micro_batch_size=most)

    def without_micro_batch(self) -> TrainingTask:
        """The same task without a micro-batch of its own, so that `settings` changes nothing."""
        return replace(self, entry=replace(self.entry, micro_batch_size=None))

    def load(self) -> Task:
        """The task, loaded anew at each call. Raises TaskError when it can't be."""
        return self.entry.read(self.sources)

    def portable(self) -> TrainingTask:
        """The same task for another machine, which reads copies and Hub datasets itself.

        A file of the user's own is read here, and its content travels.
        """
        if self.origin == "file":
            task = self.load()
            return replace(self, entry=replace(self.entry, read=lambda _: task))
        folders = [
            folder and folder.absolute() for folder in (self.sources.data, self.sources.templates)
        ]
        return replace(self, sources=Sources(*folders))


def open_tasks(
    names: Sequence[str],
    sources: Sources | None = None,
    *,
    template: str | None = None,
    choices: str | None = None,
) -> list[TrainingTask]:
    """The datasets that `names` stand for, in order; nothing is loaded.

    A name is a suite (t0hi, flan, a suite file .toml, a folder of task files), which means all its
    datasets, one dataset of a suite (`t0hi/ag_news`, `mine.toml/reviews`), a task file (.jsonl,
    .csv) or `hub:DATASET`. `template` and `choices`, as in `load_task`, are for the latter two.

    Raises TaskError for a name that is none of these, an unknown dataset, a suite to evaluate on
    only, a file that doesn't exist, and templates where nothing uses them.
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
    """The task of a file or of the Hub."""
    origin: Origin = "hub" if name.startswith(HUB) else "file"
    if origin == "file" and not Path(name).is_file():
        raise TaskError(f"Task file {name} does not exist.")
    entry = Entry(
        default_name(name),
        lambda _: load_task(name, template=template, choices=choices),
        source=name,
    )
    return TrainingTask(entry, name, origin, sources)


def _of_suite(name: str, sources: Sources) -> list[TrainingTask]:
    """The tasks of a suite, or of one of its datasets."""
    whole, _, dataset = name.rpartition("/")
    if whole in SUITES or whole.endswith(".toml"):
        suite = whole
        entries: tuple[Entry, ...] = (_trainable(suite).entry(dataset),)
    else:
        suite = name.rstrip("/")
        entries = _trainable(name).entries
    hub: Origin = "hub" if sources.data is None else "copy"
    origin: Origin = hub if suite in SUITES else "file"
    return [TrainingTask(entry, f"{suite}/{entry.name}", origin, sources) for entry in entries]


def _trainable(name: str) -> Suite:
    """The suite `name`. Raises TaskError where it is unknown or only to evaluate on."""
    trainable = [known for known, record in SUITES.items() if record.trainable]
    if name in SUITES and name not in trainable:
        raise TaskError(
            f"Suite {name} is only for evaluation; suites to train on are {', '.join(trainable)}."
        )
    is_local = name.endswith(".toml") or (name and Path(name).is_dir())
    if name not in SUITES and not is_local:
        raise TaskError(
            f"{name!r} can't be trained on; wanted a task file (.jsonl, .csv), hub:DATASET, "
            f"{' or '.join(trainable)}, one of their datasets such as {trainable[0]}/ag_news, a "
            f"suite file (.toml) or a folder of task files."
        )
    return open_suite(name)
