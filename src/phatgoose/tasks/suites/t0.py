"""The T0 suites: 36 datasets to train experts on (held-in) and 11 to evaluate on (held-out).

They have P3's prompts (`p3`). t0.toml lists the datasets and their settings, after the paper's
released code. Pairs of a row and a template are drawn before anything is rendered. Where we differ:
the draws are `random`'s instead of numpy's, and unusable pairs (see `picked`) are left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import TaskError
from ...files import read_table
from ..loading import Row
from ..task import Entry, Sources, Suite, Task
from .p3 import P3Dataset, Pair, PromptTemplate, generated, picked, ranked

SEED = 42
SET_APART_SEED = 1234
MOST_TRAIN_PAIRS = 500_000
ACCURACY = ("accuracy",)


def t0_held_in() -> Suite:
    """The suite t0hi: 36 tasks with a train and a validation split, in the paper's code's order.

    Training examples are all pairs of a row and a template, or 500 000 random ones: up to a few GB
    in memory. The validation split, on which that code selects, has one example per row, with
    original-task templates in turn; `validation_origin` says where it is from.
    """
    return Suite("t0hi", tuple(map(held_in_entry, _tables()["held_in"])))


def held_in_entry(table: Mapping[str, Any]) -> Entry:
    """The suite's entry of a row of its table of held-in datasets."""
    dataset = _HeldIn(**_tupled(table))
    pairs = (dataset.train_rows - dataset.set_apart) * dataset.train_templates
    return Entry(
        dataset.name,
        partial(_held_in_task, dataset),
        dataset.metrics,
        dataset.max_new_tokens,
        train_examples=min(pairs, MOST_TRAIN_PAIRS),
        source=dataset.source,
    )


def t0_held_out() -> Suite:
    """The suite t0ho: 11 tasks with a test split, scored by accuracy.

    Every row of the evaluation split comes in every original-task template, so that a task's
    accuracy is the mean over its templates. Story Cloze must be requested from its authors.
    """
    entries = []
    for table in _tables()["held_out"]:
        dataset = P3Dataset(**_tupled(table))
        read = partial(_held_out_task, dataset)
        entries.append(Entry(dataset.name, read, ACCURACY, source=dataset.source))
    return Suite("t0ho", tuple(entries))


@dataclass(frozen=True, kw_only=True)
class _HeldIn(P3Dataset):
    """A dataset to train on: `validation` is a split, of which at most `validation_rows` are used.

    `set_apart` rows of it become validation if it is also the training split. `references` is the
    path to a row's accepted answers, which generated text is compared with.
    """

    metrics: tuple[str, ...] = ACCURACY
    train_rows: int
    train_templates: int
    validation_rows: int | None = None
    set_apart: int = 0
    validation_templates: str = "original"
    ignored_in_validation: tuple[str, ...] = ()
    references: str | None = None
    max_new_tokens: int | None = None


@cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    return read_table(Path(__file__).with_suffix(".toml"), "Suite", TaskError)


def _tupled(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}


def _held_in_task(dataset: _HeldIn, sources: Sources) -> Task:
    templates = dataset.prompt_templates(sources)
    original = []
    for template in templates:
        fits = template.original_task or dataset.validation_templates != "original"
        if fits and template.name not in dataset.ignored_in_validation:
            original.append(template)
    train_rows = dataset.rows("train", templates, sources)
    validation_rows = dataset.rows(dataset.validation, templates, sources)
    train_numbers: Sequence[int] = range(len(train_rows))
    numbers: Sequence[int] = range(len(validation_rows))
    origin = f"split {dataset.validation}"
    if dataset.set_apart:
        shuffled = list(numbers)
        np.random.RandomState(SET_APART_SEED).shuffle(shuffled)  # the very rows of the paper's code
        numbers = shuffled[: dataset.set_apart]
        train_numbers = shuffled[dataset.set_apart :]
        origin += f", {len(numbers)} rows set apart, seed {SET_APART_SEED}"
    elif dataset.validation_rows is not None and dataset.validation_rows < len(numbers):
        chosen = random.Random(SEED).sample(numbers, dataset.validation_rows)
        origin += f", {len(chosen)} of {len(numbers)} rows, seed {SEED}"
        numbers = sorted(chosen)
    pairs = map(Pair, map(validation_rows.__getitem__, numbers), cycle(original))
    grade = ranked if dataset.metrics == ACCURACY else partial(generated, dataset.references)
    train = picked(f"{dataset.name}, training", _train_pairs(train_rows, train_numbers, templates))
    validation = picked(f"{dataset.name}, validation", pairs, grade)
    return Task(
        dataset.name,
        train=train,
        validation=validation,
        source=dataset.source,
        validation_origin=origin,
        metrics=dataset.metrics,
        max_new_tokens=dataset.max_new_tokens,
    )


def _held_out_task(dataset: P3Dataset, sources: Sources) -> Task:
    templates = [each for each in dataset.prompt_templates(sources) if each.original_task]
    rows = dataset.rows(dataset.validation, templates, sources)
    numbered = enumerate(rows)
    pairs = (Pair(row, shape, number) for number, row in numbered for shape in templates)
    test = picked(dataset.name, pairs, ranked)
    return Task(dataset.name, test=test, source=dataset.source, metrics=ACCURACY)


def _train_pairs(
    rows: Sequence[Row], row_numbers: Sequence[int], templates: Sequence[PromptTemplate]
) -> Iterator[Pair]:
    pairs: Sequence[int] = range(len(row_numbers) * len(templates))
    if len(pairs) > MOST_TRAIN_PAIRS:
        pairs = sorted(random.Random(SEED).sample(pairs, MOST_TRAIN_PAIRS))
    for row_number, group in groupby(pairs, lambda pair: pair // len(templates)):
        row = rows[row_numbers[row_number]]  # once, for its pairs follow each other
        for pair in group:
            yield Pair(row, templates[pair % len(templates)])
