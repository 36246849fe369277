"""Multitask: one expert on all tasks at once, the paper's reference (section 4.2).

It needs every contributor's data in one place, which the setting rules out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import TaskError
from .suites.entries import Entry, Sources
from .suites.registry import Origin, TrainingTask
from .task import VALIDATION_MOST, Task, draw


def mix(tasks: Sequence[Task], name: str, *, most: int | None = None, seed: int = 0) -> Task:
    """One task with the training examples of all `tasks`, and no test split.

    Each task counts in proportion to its size. A task with more than `most` examples gives `most`,
    drawn once by `seed` (as T0 caps large datasets). Validation examples are each task's own, or
    those that `with_validation(seed)` sets apart, up to VALIDATION_MOST of each, so that the few
    that training draws are not all of the largest task. Raises TaskError when there are no tasks,
    one can't be trained on, or `most` is below 1.
    """
    if not tasks:
        raise TaskError(f"The mixture {name!r} has no tasks.")
    if most is not None and most < 1:
        raise TaskError(f"most is {most}, but must be at least 1.")
    for task in tasks:
        if not task.train:
            raise TaskError(f"Task {task.name!r} has no training examples to mix.")
    divided = [task.with_validation(seed) for task in tasks]
    parts = [draw(task.train, most, seed) for task in divided]
    sizes = (f"{task.source} ({len(part)})" for task, part in zip(tasks, parts, strict=True))
    validation = [draw(task.validation, VALIDATION_MOST, seed) for task in divided]
    return Task(
        name,
        train=tuple(row for part in parts for row in part),
        validation=tuple(row for part in validation for row in part),
        source=f"mixture of {', '.join(sizes)}",
        validation_origin=f"each task's own, or set apart from it by seed {seed}; at most "
        f"{VALIDATION_MOST} of each",
    )


def mixture(
    tasks: Sequence[TrainingTask], name: str, *, most: int | None = None, seed: int = 0
) -> TrainingTask:
    """`mix` of tasks that are not loaded yet. Loading it holds all of them in memory at once."""
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

    def portable(self) -> TrainingTask:
        tasks = [task.portable() for task in self.tasks]
        return mixture(tasks, self.name, most=self.most, seed=self.seed)
