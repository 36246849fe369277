"""BIG-bench Hard and Lite as the paper evaluates on them (Muqeeth et al. 2024, section 4.1).

The paper counts 23 and 24 tasks; its released code evaluates 22 and 17 of them, which are the
default here. The table bigbench.toml lists tasks, metrics and limits. Where we differ: every choice
that BIG-bench scores 1 is right in every task, in the released code in three (geometric_shapes,
novel_concepts, reasoning_about_colored_objects); others rarely have more than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import TaskError
from ...files import read_table
from ..loading import read_rows
from ..task import Entry, Example, Sources, Suite, Task

SUFFIX = "\nAnswer:"  # the whole prompt: no instruction, no worked examples


def bbh(*, complete: bool = False) -> Suite:
    """The suite "bbh": the 22 tasks of BIG-bench Hard that the paper's released code evaluates.

    `complete` adds dyck_languages, the paper's 23rd. A prompt is a row's input and a line
    "Answer:". A task's `test` holds all rows of the dataset's train and validation splits (of three
    tasks from lukaemon/bbh: of its test split). Every choice that BIG-bench scores 1 is a right
    answer.
    """
    return _suite("bbh", "bbh-23", complete)


def bbl(*, complete: bool = False) -> Suite:
    """The suite "bbl": the 17 tasks of BIG-bench Lite that the paper's released code evaluates.

    `complete` adds the 7 others of the paper's 24 ("bbl-24"); see `bbh`.
    """
    return _suite("bbl", "bbl-24", complete)


def _suite(name: str, complete_name: str, complete: bool) -> Suite:
    table = read_table(Path(__file__).with_suffix(".toml"), "Suite", TaskError)
    names = [task for task in table[name] if complete or task not in table["not_evaluated"]]
    entries = tuple(_entry(task, table["tasks"][task], table["dataset"]) for task in names)
    return Suite(complete_name if complete else name, entries)


def _entry(name: str, row: Mapping[str, Any], dataset: str) -> Entry:
    dataset = row.get("dataset", dataset)
    most = row["max_length"] - 1 if "max_length" in row else None  # it counts the start token too
    task = Task(name, source=f"{dataset}, {name}", metrics=(row["metric"],), max_new_tokens=most)

    def read(sources: Sources) -> Task:
        if "dataset" in row:
            choices = tuple(row.get("choices", ()))
            examples = _hard_examples(sources, dataset, name, choices)
        else:
            examples = _bigbench_examples(sources, dataset, name, row["references"])
        return replace(task, test=tuple(examples))

    return Entry(name, read, task.metrics, most, row["micro_batch_size"], source=task.source)


def _hard_examples(
    sources: Sources, dataset: str, name: str, choices: tuple[str, ...]
) -> Iterator[Example]:
    """A task of lukaemon/bbh: rows of input and target, with the same `choices` for all."""
    for number, row in enumerate(read_rows(sources, dataset, name, "test"), 1):
        where = f"{dataset}, {name}, row {number}"
        _require_fields(row, ("input", "target"), where)
        if choices and row["target"] not in choices:
            raise TaskError(
                f"{where}: target {row['target']!r} is not among the choices {list(choices)}."
            )
        yield Example(row["input"] + SUFFIX, row["target"], choices)


def _bigbench_examples(
    sources: Sources, dataset: str, name: str, references: str
) -> Iterator[Example]:
    """A task of tasksource/bigbench; right are the choices, the first target or all targets."""
    for split in ("train", "validation"):
        for number, row in enumerate(read_rows(sources, dataset, name, split), 1):
            where = f"{dataset}, {name}, {split} row {number}"
            _require_fields(row, ("inputs", "targets"), where)
            if not row["targets"]:
                raise TaskError(f"{where}: there are no targets.")
            if references == "choices":
                yield _with_choices(row, where)
            else:
                right = tuple(row["targets"] if references == "all" else row["targets"][:1])
                yield Example(row["inputs"] + SUFFIX, max(row["targets"], key=len), (), right)


def _with_choices(row: Mapping[str, Any], where: str) -> Example:
    _require_fields(row, ("multiple_choice_targets", "multiple_choice_scores"), where)
    choices = tuple(row["multiple_choice_targets"])
    if not choices:
        raise TaskError(f"{where}: there are no choices, and the task is scored by them.")
    scores = row["multiple_choice_scores"]
    if len(scores) != len(choices):
        raise TaskError(f"{where}: {len(choices)} choices but {len(scores)} scores.")
    right = tuple(text for text, score in zip(choices, scores, strict=True) if score == 1)
    target = max(row["targets"], key=len)
    if target not in right:  # a target may continue with a reason, as in strategyqa
        target = _nearest(target, right or choices)
    return Example(row["inputs"] + SUFFIX, target, choices, right or (target,))


def _nearest(target: str, choices: tuple[str, ...]) -> str:
    """The choice most like the target, position by position; ties go to the shorter, then the
    later.
    """
    equal = [sum(a == b for a, b in zip(target, choice, strict=False)) for choice in choices]
    ranked = [(equal[i], -len(choice), i) for i, choice in enumerate(choices)]
    return choices[max(ranked)[2]]


def _require_fields(row: Mapping[str, Any], fields: tuple[str, ...], where: str) -> None:
    for field in fields:
        if row.get(field) is None:
            raise TaskError(
                f"{where}: field {field} is missing; the fields there are {', '.join(row)}."
            )
