"""The demo's skills: each a task to train an expert on, and an unseen task that asks for it.

The unseen task is of another domain, with other texts and other wordings of the instruction, and
for some skills other answer words. What an answer is called (which code stands for which topic) is
a convention of ours that no base can know; a house fine-tunes for its conventions. All
texts in `tasks/` were written for this demo.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...tasks.loading import load_task
from ...tasks.suites.entries import Entry, Suite
from ...tasks.task import Task

__all__ = ["SKILLS", "TASKS", "trained_task", "unseen_suite", "unseen_tasks"]
__all__ += ["without_choices"]

TASKS = Path(__file__).parent / "tasks"
SKILLS = {  # the training task, which names the expert: the unseen task
    "sentiment": "hotel_feedback",
    "archive": "evening_classes",
    "dates": "family_papers",
    "bookings": "course_places",
    "village": "village_post",
}


def trained_task(name: str) -> Task:
    """The training task of an expert of SKILLS."""
    return load_task(TASKS / f"{name}.csv")


def unseen_tasks(most: int) -> list[Task]:
    """The unseen tasks in the order of SKILLS, with at most so many examples each."""
    tasks = (load_task(TASKS / f"{name}.csv") for name in SKILLS.values())
    return [replace(task, test=task.test[:most]) for task in tasks]


def without_choices(tasks: list[Task]) -> list[Task]:
    """The `tasks` as a served model gets them: without choices, to be answered in writing."""
    return [
        replace(task, test=tuple(replace(row, choices=()) for row in task.test)) for task in tasks
    ]


def unseen_suite(tasks: list[Task]) -> Suite:
    """The `tasks` as a suite called unseen."""

    def entry(task: Task) -> Entry:
        return Entry(task.name, lambda _: task)

    return Suite("unseen", tuple(map(entry, tasks)))
