"""BIG-bench Hard and Lite as the paper evaluates on them (Muqeeth et al. 2024, section 4.1).

The paper counts 23 and 24 tasks; its released code evaluates 22 and 17 of them, which are the
default here. The table bigbench.toml lists tasks, metrics and limits. Where we differ: every choice
that BIG-bench scores 1 is right in every task, in the released code in three (geometric_shapes,
novel_concepts, reasoning_about_colored_objects); others rarely have more than one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import compress
from pathlib import Path

from ...errors import TaskError
from ...files import read_table
from ..loading import Row, examples_of, read_rows
from ..task import Entry, Example, Sources, Suite, Task

SUFFIX = "\nAnswer:"  # the whole prompt: no instruction, no worked examples


def suite(name: str) -> Suite:
    """The suite "bbh" or "bbl": the 22 and 17 tasks that the paper's released code evaluates.

    "bbh-23" and "bbl-24" are all that the paper counts. A prompt is a row's input and a line
    "Answer:". A task's `test` holds all rows of the dataset's train and validation splits (of three
    tasks from lukaemon/bbh: of its test split). Every choice that BIG-bench scores 1 is a right
    answer.
    """
    table = read_table(Path(__file__).with_suffix(".toml"), "Suite", TaskError)
    listed, _, complete = name.partition("-")
    entries = []
    for task in table[listed]:
        if complete or task not in table["not_evaluated"]:
            entries.append(_entry(task, table["tasks"][task], table["dataset"]))
    return Suite(name, tuple(entries))


def _entry(name: str, row: Row, dataset: str) -> Entry:
    dataset = row.get("dataset", dataset)
    most = None
    if "max_length" in row:
        most = row["max_length"] - 1  # it counts the start token too
    task = Task(name, source=f"{dataset}, {name}", metrics=(row["metric"],), max_new_tokens=most)
    splits = ["train", "validation"]
    make = partial(_of_bigbench, row.get("references"))
    if "dataset" in row:
        splits = ["test"]
        make = partial(_of_bbh, tuple(row.get("choices", ())))

    def read(sources: Sources) -> Task:
        examples: list[Example] = []
        for split in splits:
            rows = read_rows(sources, dataset, name, split)
            examples += examples_of(rows, f"{task.source}, {split}", make)
        return replace(task, test=tuple(examples))

    return Entry(name, read, task.metrics, most, source=task.source)


def _of_bbh(choices: tuple[str, ...], row: Row) -> Example:
    """A row of lukaemon/bbh has input and target, and all of a task's rows the same `choices`."""
    return Example(row["input"] + SUFFIX, row["target"], choices)


def _of_bigbench(references: str | None, row: Row) -> Example:
    """Of a row of tasksource/bigbench the choices, all targets or the first one are right."""
    text = row["inputs"] + SUFFIX
    targets = row["targets"]
    target = max(targets, key=len)
    if references != "choices":
        count = len(targets) if references == "all" else 1
        return Example(text, target, (), tuple(targets[:count]))
    choices = tuple(row["multiple_choice_targets"])
    is_right = [score == 1 for score in row["multiple_choice_scores"]]
    right = tuple(compress(choices, is_right))
    if target not in right:  # a target may continue with a reason, as in strategyqa
        target = _nearest(target, right or choices)
    return Example(text, target, choices, right or (target,))


def _nearest(target: str, choices: tuple[str, ...]) -> str:
    """The choice most like the target, position by position; ties go to the shorter, then the
    later.
    """

    def likeness(choice: str) -> tuple[int, int]:
        return sum(map(str.__eq__, target, choice)), -len(choice)

    return max(reversed(choices), key=likeness)
