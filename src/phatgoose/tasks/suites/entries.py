"""A suite: named datasets that are not loaded yet, and where their files are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import TaskError
from ..task import Task


@dataclass(frozen=True)
class Sources:
    """Where a suite's files are.

    `data` is a folder with copies of Hub datasets, each in the layout of its repository, at
    `data/OWNER/NAME` or `data/NAME`; None reads from the Hub (or its cache). `templates` is a
    folder of promptsource templates (`DATASET/CONFIG/templates.yaml`); None uses those of the
    installed package promptsource.
    """

    data: Path | None = None
    templates: Path | None = None


@dataclass(frozen=True)
class Entry:
    """One dataset of a suite.

    `read` loads it. `metrics` and `max_new_tokens` are those of the task that `read` returns.
    `micro_batch_size` is the paper's code's for training on this dataset, `train_examples` the
    number of training examples if known without loading; None means unknown. `source` says in
    words where the data come from.
    """

    name: str
    read: Callable[[Sources], Task]
    metrics: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    micro_batch_size: int | None = None
    train_examples: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Suite:
    name: str
    entries: tuple[Entry, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    def entry(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise TaskError(
            f"Suite {self.name} has no dataset {name!r}; it has {', '.join(self.names)}."
        )

    def load(self, sources: Sources | None = None) -> tuple[Task, ...]:
        return tuple(entry.read(sources or Sources()) for entry in self.entries)
