"""The T0 suites: 36 datasets to train experts on (held-in) and 11 to evaluate on (held-out).

Prompts are P3's (Sanh et al. 2022, "Multitask Prompted Training Enables Zero-Shot Task
Generalization"). What is in which suite, and how, follows the paper's released code and stands in
t0.toml. Pairs of a row and a template are drawn before anything is rendered. Where we differ: the
draws are `random`'s instead of numpy's, and pairs that can't be used (see `_Picker`) are left out.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import TaskError
from ...files.strict_toml import read_toml
from ..task import Example, Task
from .entries import Entry, Sources, Suite
from .hub import read_rows
from .promptsource import PromptTemplate, read_templates, templates_folder

__all__ = ["held_in_entry", "t0_held_in", "t0_held_out"]

SEED = 42
SET_APART_SEED = 1234
MOST_TRAIN_PAIRS = 500_000
ACCURACY = ("accuracy",)

Row = Mapping[str, Any]


def t0_held_in() -> Suite:
    """The suite t0hi: 36 tasks with a train and a validation split, in the paper's code's order.

    Training examples are every row in every template, or 500 000 random such pairs where there are
    more: in memory that is up to a few GB for the datasets with long texts (wiki_hop, multi_news).
    The validation split, on which that code selects, has one example a row: original-task templates
    take turns. It is the test split of six datasets, and a part of some large ones; the task's
    `validation_origin` tells.
    """
    return Suite("t0hi", tuple(held_in_entry(table) for table in _tables()["held_in"]))


def held_in_entry(table: Mapping[str, Any]) -> Entry:
    """The entry of a dataset to train on, described as in t0.toml's tables [[held_in]]."""
    dataset = _HeldIn(**_tupled(table))
    return Entry(
        dataset.name,
        partial(_held_in_task, dataset),
        metrics=dataset.metrics,
        max_new_tokens=dataset.max_new_tokens,
        micro_batch_size=dataset.micro_batch_size,
        train_examples=dataset.train_examples,
        source=dataset.source,
    )


def t0_held_out() -> Suite:
    """The suite t0ho: 11 tasks with a test split, scored by accuracy.

    Every row of the evaluation split comes in every original-task template, so that a task's
    accuracy is the mean over its templates. Story Cloze has to be asked for from its authors.
    """
    entries = tuple(
        Entry(
            dataset.name, partial(_held_out_task, dataset), metrics=ACCURACY, source=dataset.source
        )
        for dataset in (_HeldOut(**_tupled(table)) for table in _tables()["held_out"])
    )
    return Suite("t0ho", entries)


# --- what t0.toml says ---


@dataclass(frozen=True)
class _Dataset:
    """What both kinds of dataset have.

    `templates` is the folder of its promptsource file; empty where `prompt` (in the same notation)
    and `prompt_choices` stand in for it. `ignored` names templates that are never used. `rename`
    maps names of fields in some copies of the dataset to those in the templates.
    """

    name: str
    hub: str
    config: str | None = None
    templates: str = ""
    ignored: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    prompt_choices: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where the data come from, in words."""
        return f"{self.hub}, prompts of P3"


@dataclass(frozen=True, kw_only=True)
class _HeldIn(_Dataset):
    """A dataset to train on.

    `validation` is a split, of which `validation_rows` random rows are taken at most (None: all).
    `set_apart` rows of that split are set apart for validation where it is also the one to train
    on. `references` is the path to a row's accepted answers, which generated text is compared with.
    """

    metrics: tuple[str, ...]
    micro_batch_size: int
    train_rows: int
    train_templates: int
    validation: str = "validation"
    validation_rows: int | None = None
    set_apart: int = 0
    validation_templates: str = "original"
    ignored_in_validation: tuple[str, ...] = ()
    references: str | None = None
    max_new_tokens: int | None = None

    @property
    def train_examples(self) -> int:
        """How many pairs of a row and a template there are to train on."""
        pairs = (self.train_rows - self.set_apart) * self.train_templates
        return min(pairs, MOST_TRAIN_PAIRS)


@dataclass(frozen=True, kw_only=True)
class _HeldOut(_Dataset):
    """A dataset to evaluate on. `manual` says how to get it where the Hub doesn't have it."""

    split: str
    manual: str = ""


@cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    return read_toml(Path(__file__).with_suffix(".toml"), "Suite", TaskError)


def _tupled(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}


# --- the two kinds of task ---


def _held_in_task(dataset: _HeldIn, sources: Sources) -> Task:
    templates = _templates(dataset, sources)
    original = _without(templates, dataset.ignored_in_validation, dataset)
    if dataset.validation_templates == "original":
        original = [template for template in original if template.original_task]
    train_rows = _rows(dataset, "train", templates, sources)
    validation_rows = _rows(dataset, dataset.validation, templates, sources)
    train_numbers: Sequence[int] = range(len(train_rows))
    numbers: Sequence[int] = range(len(validation_rows))
    origin = f"split {dataset.validation}"
    if dataset.set_apart:
        shuffled = list(numbers)
        np.random.RandomState(SET_APART_SEED).shuffle(shuffled)  # the very rows of the paper's code
        numbers, train_numbers = shuffled[: dataset.set_apart], shuffled[dataset.set_apart :]
        origin += f", {len(numbers)} rows set apart, seed {SET_APART_SEED}"
    elif dataset.validation_rows is not None and dataset.validation_rows < len(numbers):
        chosen = random.Random(SEED).sample(numbers, dataset.validation_rows)
        origin += f", {len(chosen)} of {len(numbers)} rows, seed {SEED}"
        numbers = sorted(chosen)
    picker = _Picker(dataset.name, dataset.references, generated=dataset.metrics != ACCURACY)
    train = picker.training(_train_pairs(train_rows, train_numbers, templates))
    validation = picker.graded(
        (validation_rows[row], original[i % len(original)]) for i, row in enumerate(numbers)
    )
    picker.warn()
    return Task(
        dataset.name,
        train=train,
        validation=validation,
        source=dataset.source,
        validation_origin=origin,
        metrics=dataset.metrics,
        max_new_tokens=dataset.max_new_tokens,
    )


def _held_out_task(dataset: _HeldOut, sources: Sources) -> Task:
    if dataset.manual and sources.data is None:
        raise TaskError(f"{dataset.manual}.")
    templates = [each for each in _templates(dataset, sources) if each.original_task]
    try:
        rows = _rows(dataset, dataset.split, templates, sources)
    except TaskError as error:
        if dataset.manual:
            raise TaskError(f"{error} {dataset.manual}.") from error
        raise
    picker = _Picker(dataset.name)
    test = picker.graded((row, template) for row in rows for template in templates)
    picker.warn()
    return Task(dataset.name, test=test, source=dataset.source, metrics=ACCURACY)


def _train_pairs(
    rows: Sequence[Row], row_numbers: Sequence[int], templates: Sequence[PromptTemplate]
) -> Iterator[tuple[Row, PromptTemplate]]:
    """Those rows in all templates, or 500 000 random ones of these pairs, in order."""
    pairs: Sequence[int] = range(len(row_numbers) * len(templates))
    if len(pairs) > MOST_TRAIN_PAIRS:
        pairs = sorted(random.Random(SEED).sample(pairs, MOST_TRAIN_PAIRS))
    for row_number, group in groupby(pairs, lambda pair: pair // len(templates)):
        row = rows[row_numbers[row_number]]  # once, for its pairs follow each other
        for pair in group:
            yield row, templates[pair % len(templates)]


# --- rows and templates ---


def _templates(dataset: _Dataset, sources: Sources) -> list[PromptTemplate]:
    """The dataset's templates without the ignored ones, sorted by name."""
    if dataset.prompt:
        choices = "|||".join(dataset.prompt_choices)
        return [PromptTemplate(dataset.name, dataset.prompt, choices, original_task=True)]
    path, _, config = dataset.templates.partition("/")
    templates = read_templates(templates_folder(sources), path, config or None)
    return _without(templates, dataset.ignored, dataset)


def _without(
    templates: Iterable[PromptTemplate], ignored: Sequence[str], dataset: _Dataset
) -> list[PromptTemplate]:
    templates = list(templates)
    missing = [name for name in ignored if name not in {each.name for each in templates}]
    if missing:
        raise TaskError(
            f"The templates of {dataset.templates} have no {missing[0]!r}, which {dataset.name} "
            f"leaves out; use those of promptsource 0.2.3."
        )
    return [template for template in templates if template.name not in ignored]


def _rows(
    dataset: _Dataset, split: str, templates: Iterable[PromptTemplate], sources: Sources
) -> Sequence[Row]:
    """The split's rows, checked to have the fields that the templates mention."""
    rows = read_rows(sources, dataset.hub, dataset.config, split)
    if not len(rows):
        raise TaskError(f"Split {split} of {dataset.hub} has no rows.")
    if dataset.rename:
        rows = _Renamed(rows, dataset.rename)
    fields = rows[0].keys()
    for template in templates:
        if missing := template.fields - fields:
            raise TaskError(
                f"Split {split} of {dataset.hub} has no field {min(missing)}, which the template "
                f"{template.name!r} needs; its fields are {', '.join(fields)}."
            )
    return rows


class _Renamed(Sequence[Row]):
    """Rows with other names for some of their fields."""

    def __init__(self, rows: Sequence[Row], names: Mapping[str, str]) -> None:
        self._rows, self._names = rows, names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return {self._names.get(name, name): value for name, value in self._rows[index].items()}


# --- examples ---


class _Picker:
    """Makes examples of one dataset's pairs of a row and a template, and counts those left out.

    Left out are pairs that the template renders no input or no target for, pairs that it can't be
    filled for and, where answers are ranked, pairs whose target is not one of the answer choices.
    The paper's code puts "<NO INPUT>" and "<NO LABEL>" there, and takes the choice closest to the
    target as the right one.
    """

    def __init__(
        self, name: str, references: str | None = None, *, generated: bool = False
    ) -> None:
        self._name, self._references, self._generated = name, references, generated
        self._pairs = 0
        self._left_out: Counter[str] = Counter()
        self._failure = ""

    def training(self, pairs: Iterable[tuple[Row, PromptTemplate]]) -> tuple[Example, ...]:
        """Examples to train on; their choices are what the prompt offers, if anything."""
        examples = (self._example(row, template) for row, template in pairs)
        return self._some("training", examples)

    def graded(self, pairs: Iterable[tuple[Row, PromptTemplate]]) -> tuple[Example, ...]:
        """Examples to score on: with choices to rank, or without any where text is generated."""
        grade = self._open_ended if self._generated else self._ranked
        return self._some("evaluation", (grade(row, template) for row, template in pairs))

    def warn(self) -> None:
        """Warn, once, of the pairs that were left out."""
        if self._left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._left_out.items())
            first = f" First failure: {self._failure}" if self._failure else ""
            warnings.warn(
                f"{self._name}: {self._left_out.total()} of {self._pairs} pairs of a row and a "
                f"prompt template are left out: {reasons}.{first}",
                stacklevel=3,
            )

    def _some(self, use: str, examples: Iterable[Example | None]) -> tuple[Example, ...]:
        kept = tuple(example for example in examples if example is not None)
        if not kept:
            reasons = ", ".join(self._left_out) or "there are no pairs of a row and a template"
            raise TaskError(
                f"{self._name} has no {use} examples: {reasons}. {self._failure}".rstrip()
            )
        return kept

    def _example(self, row: Row, template: PromptTemplate) -> Example | None:
        self._pairs += 1
        try:
            rendered = template.render(row)
        except TaskError as error:
            self._failure = self._failure or str(error)
            self._left_out["whose template can't be filled"] += 1
            return None
        if rendered is None:
            self._left_out["without an input or a target"] += 1
            return None
        return Example(
            rendered.input,
            rendered.target,
            rendered.choices,
            rendered.references,
            rendered.passage,
        )

    def _ranked(self, row: Row, template: PromptTemplate) -> Example | None:
        example = self._example(row, template)
        if example is not None and example.target not in example.choices:
            self._left_out["whose target is not among the answer choices"] += 1
            return None
        return example

    def _open_ended(self, row: Row, template: PromptTemplate) -> Example | None:
        example = self._example(row, template)
        if example is None:
            return None
        found = self._accepted(row, self._references) if self._references else ()
        return replace(example, choices=(), references=found or example.references)

    def _accepted(self, row: Row, path: str) -> tuple[str, ...]:
        """The answers at `path` in a row, without empty ones."""
        value: Any = row
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise TaskError(f"{self._name}: a row has no field {path}, wanted its answers.")
            value = value[name]
        texts = [value] if isinstance(value, str) else value or []
        return tuple(text for text in texts if text.strip())
