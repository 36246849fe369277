"""Tasks: examples with an input, a target and, where there are any, answer choices.

Sources are JSON Lines, CSV, datasets from the Hub or rows already in memory. Fields can be taken
as they are or rendered by a template in promptsource's notation (`input ||| target`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from ..errors import TaskError
from ..files.quoting import one_line

__all__ = ["Example", "Span", "Task", "default_name", "load_task", "longest_field", "mix"]

SPLITS = ("train", "validation", "test")
SEPARATOR = "|||"
VALIDATION_SHARE = 0.1
VALIDATION_MOST = 500
Span = tuple[int, int]  # of characters in a text: the first, and the first after it
# What an expression in a user's template may raise.
TEMPLATE_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Example:
    """One example. `choices` is empty for open-ended tasks; `references` are all right answers.

    `passage` is where in `input` the longest field of its template stands, which is what an input
    that is too long loses a part of; None where no template is known. Examples that differ in
    nothing else are equal.
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    passage: Span | None = field(default=None, compare=False)

    @property
    def answers(self) -> tuple[str, ...]:
        """Every accepted answer: the references, or the target alone."""
        return self.references or (self.target,)


@dataclass(frozen=True)
class Task:
    """A named dataset and how it is scored.

    `validation_origin` tells where the validation split came from, `source` the data, of a file its
    name alone. `metrics` are names in
    `evaluation.metrics.METRICS`, the task's score being their mean; empty means accuracy where
    there are choices and exact match elsewhere. `max_new_tokens` bounds generated answers, None
    leaves that to whoever evaluates.
    """

    name: str
    train: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    source: str = "memory"
    validation_origin: str = "given"
    metrics: tuple[str, ...] = ()
    max_new_tokens: int | None = None

    @property
    def digest(self) -> str:
        """A hash of all examples: the same for the same data, wherever they came from."""
        splits = [
            [asdict(row) for row in part] for part in (self.train, self.validation, self.test)
        ]
        return hashlib.sha256(json.dumps(splits).encode()).hexdigest()

    def with_validation(self, seed: int = 0) -> Task:
        """The task with a validation split: its own, or a tenth of `train` (500 at most) set apart.

        The choice depends on `seed` alone and is told in `validation_origin`. Raises TaskError when
        there is no training example, or are fewer than two to divide.
        """
        if self.validation and self.train:
            return self
        if len(self.train) < 2:
            raise TaskError(
                f"Task {self.name!r} has {len(self.train)} training examples; training needs at "
                f"least two, one of them for validation."
            )
        count = min(max(1, round(len(self.train) * VALIDATION_SHARE)), VALIDATION_MOST)
        chosen = set(random.Random(seed).sample(range(len(self.train)), count))
        return replace(
            self,
            train=tuple(row for i, row in enumerate(self.train) if i not in chosen),
            validation=tuple(row for i, row in enumerate(self.train) if i in chosen),
            validation_origin=f"{count} of {len(self.train)} training examples, seed {seed}",
        )

    def evaluation_examples(self, limit: int | None = None, seed: int = 0) -> tuple[Example, ...]:
        """The examples to score on: test, else validation, else train.

        `limit` draws so many of them (the same ones for a given `seed`, in file order); None keeps
        all. Raises TaskError when the task is empty or `limit` is below 1.
        """
        if limit is not None and limit < 1:
            raise TaskError(f"limit is {limit}, but must be at least 1.")
        examples = self.test or self.validation or self.train
        if not examples:
            raise TaskError(f"Task {self.name!r} has no examples.")
        return _draw(examples, limit, seed)


def load_task(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    name: str | None = None,
    template: str | None = None,
    choices: str | None = None,
) -> Task:
    """The task in `source`.

    `source` is a `.jsonl` or `.csv` file, `hub:ID`, `hub:ID:CONFIG` or either with `@REVISION`
    (read with the `datasets` library), or rows in memory (dicts, a `Dataset`, a `DatasetDict`).
    Splits of a `DatasetDict` with other names than these three are left out with a warning.
    Rows have the fields `input`, `target`, optional `choices`, `references` and `split` (train,
    validation or test; train when absent). With `template` ("input ||| target", jinja2, as in
    promptsource) these two are rendered from whatever fields a row has, and `choices`
    ("yes ||| no", jinja2) likewise. `name` defaults to the file's stem.

    Raises TaskError, naming the line, for a missing file, broken line, missing field, a target that
    is not among the choices, or a source without examples.
    """
    rows, label, default_name = _open_source(source)
    renderer = _Renderer(template, choices)
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for where, row in rows:
        split = row.get("split") or "train"
        if split not in splits:
            raise TaskError(f"{where}: split is {split!r}, but must be {', '.join(SPLITS)}.")
        example = _example(renderer.render(row, where), where)
        passage = longest_field(row, example.input) if template else None
        splits[split].append(replace(example, passage=passage))
    if not any(splits.values()):
        place = source if isinstance(source, str | Path) else label
        raise TaskError(f"{place} has no examples.")
    return Task(
        name or default_name,
        train=tuple(splits["train"]),
        validation=tuple(splits["validation"]),
        test=tuple(splits["test"]),
        source=label,
    )


def default_name(source: str | Path) -> str:
    """What the task of a file or of `hub:DATASET` is called unless it is given another name."""
    if isinstance(source, str) and source.startswith("hub:"):
        return source[4:].split("@")[0].replace("/", "--").replace(":", "--")
    return Path(source).stem


def mix(tasks: Sequence[Task], name: str, *, most: int | None = None, seed: int = 0) -> Task:
    """One task of the training examples of all `tasks`, for the Multitask model (METHOD section 5).

    Training draws from it evenly, hence from each task in proportion to its size, or to `most`
    where it has more examples than that: so many are then drawn, once, by `seed` (as T0 caps large
    datasets). None caps nothing. Validation examples, each task's own or those that
    `with_validation(seed)` sets apart, stand in turns, so that the first few come from all tasks
    alike. There is no test split.

    Raises TaskError when there are no tasks, one can't be trained on, or `most` is below 1.
    """
    if not tasks:
        raise TaskError(f"The mixture {name!r} has no tasks.")
    if most is not None and most < 1:
        raise TaskError(f"most is {most}, but must be at least 1.")
    for task in tasks:
        if not task.train:
            raise TaskError(f"Task {task.name!r} has no training examples to mix.")
    divided = [task.with_validation(seed) for task in tasks]
    parts = [_draw(task.train, most, seed) for task in divided]
    sizes = (f"{task.source} ({len(part)})" for task, part in zip(tasks, parts, strict=True))
    turns = zip_longest(*(task.validation for task in divided))
    return Task(
        name,
        train=tuple(row for part in parts for row in part),
        validation=tuple(row for turn in turns for row in turn if row is not None),
        source=f"mixture of {', '.join(sizes)}",
        validation_origin=f"each task's own, or set apart from it by seed {seed}",
    )


def _draw(examples: tuple[Example, ...], most: int | None, seed: int) -> tuple[Example, ...]:
    """At most so many of the examples (None: all), the same for a given seed, in file order."""
    if most is None or most >= len(examples):
        return examples
    chosen = sorted(random.Random(seed).sample(range(len(examples)), most))
    return tuple(examples[i] for i in chosen)


Rows = Iterator[tuple[str, Mapping[str, Any]]]


def _open_source(source: str | Path | Iterable[Mapping[str, Any]]) -> tuple[Rows, str, str]:
    """(located rows, how to call the source, a name for the task)."""
    if isinstance(source, str) and source.startswith("hub:"):
        return _read_hub(source), source, default_name(source)
    if not isinstance(source, str | Path):
        return _read_memory(source), "memory", "task"
    path = Path(source)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise TaskError(f"Task {path} must be a .jsonl or .csv file, or hub:DATASET.")
    if not path.is_file():
        raise TaskError(f"Task file {path} does not exist.")
    return readers[path.suffix](path), path.name, default_name(path)


def _read_jsonl(path: Path) -> Rows:
    try:
        with path.open(encoding="utf-8-sig") as lines:  # str.splitlines would split at U+2028 too
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parse(line, where)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"Task file {path} can't be read: {error}.") from error


def _parse(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: broken JSON ({one_line(error)}).") from error
    if not isinstance(row, dict):
        raise TaskError(f"{where}: wanted an object with fields, got {line[:40]!r}.")
    return row


def _read_csv(path: Path) -> Rows:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in (reader := csv.DictReader(file)):
                yield f"{path}, line {reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"Task file {path} can't be read: {error}.") from error


def _read_hub(source: str) -> Rows:
    try:
        import datasets  # an optional extra, needed for this kind of source alone
    except ImportError as error:
        raise TaskError(f"{source} needs datasets: pip install 'phatgoose[datasets]'.") from error
    address, _, revision = source.removeprefix("hub:").partition("@")
    dataset, _, config = address.partition(":")
    try:
        loaded = datasets.load_dataset(dataset, config or None, revision=revision or None)
    except Exception as error:  # datasets documents no common base class for what it raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TaskError(f"{source} can't be loaded: {reason}") from error
    yield from _read_memory(loaded, source)


def _read_memory(rows: Any, label: str = "memory") -> Rows:
    if isinstance(rows, Mapping):  # a DatasetDict: split name -> rows
        unknown = [split for split in rows if split not in SPLITS]
        if unknown:
            warnings.warn(
                f"{label}: splits left out: {', '.join(map(str, unknown))}.", stacklevel=4
            )
        for split in SPLITS:
            for number, row in enumerate(rows.get(split, ()), 1):
                yield f"{label}, {split} row {number}", {"split": split, **row}
        return
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise TaskError(f"{label}, row {number}: wanted a dict with fields, got {row!r:.40}.")
        yield f"{label}, row {number}", row


def longest_field(
    row: Mapping[str, Any], text: str, shown: Callable[[str], str] = str
) -> Span | None:
    """Where in `text` the longest of a row's values stands of those that are in it, once each.

    Values within lists and dicts count for themselves. `shown` makes of a value what its template
    makes of it. None where no value is found.
    """
    for value in sorted(_texts_in(row), key=len, reverse=True):
        piece = shown(value).strip()
        if piece and text.count(piece) == 1:
            start = text.index(piece)
            return start, start + len(piece)
    return None


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


class _Renderer:
    """Makes `input`, `target` and `choices` out of a row's fields by the user's templates."""

    def __init__(self, template: str | None, choices: str | None) -> None:
        environment = SandboxedEnvironment(undefined=StrictUndefined)
        if template is not None and template.count(SEPARATOR) != 1:
            raise TaskError(f"template must have the form 'input {SEPARATOR} target'.")
        try:
            parts = template.split(SEPARATOR) if template else []
            self._parts = [environment.from_string(part) for part in parts]
            self._choices: Template | None = environment.from_string(choices) if choices else None
        except TemplateError as error:
            raise TaskError(f"template is not valid jinja2: {error}.") from error

    def render(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The row with its rendered fields in place of (or beside) its own."""
        rendered = dict(row)
        try:
            if self._choices:
                text = self._choices.render(row)
                rendered["choices"] = [choice.strip() for choice in text.split(SEPARATOR)]
            for key, part in zip(("input", "target"), self._parts, strict=False):
                fields = {**row, "answer_choices": rendered.get("choices")}
                rendered[key] = part.render(fields).strip()
        except TEMPLATE_FAILURES as error:
            raise TaskError(f"{where}: the template can't be filled: {error}.") from error
        return rendered


def _example(row: Mapping[str, Any], where: str) -> Example:
    """The example in `row`, checked."""
    texts = {}
    for key in ("input", "target"):
        value = row.get(key)
        if value is None or isinstance(value, list | dict) or str(value) == "":
            fields = ", ".join(map(str, row)) or "none"
            raise TaskError(f"{where}: {key} is missing or empty; the fields there are {fields}.")
        texts[key] = str(value)
    choices = _texts(row.get("choices"), f"{where}: choices")
    references = _texts(row.get("references"), f"{where}: references")
    if choices and texts["target"] not in choices:
        raise TaskError(
            f"{where}: target {texts['target']!r} is not among the choices {list(choices)}."
        )
    return Example(texts["input"], texts["target"], choices, references)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts, given as such or, in CSV cells, as JSON or separated by |||."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.startswith("[") else value.split(SEPARATOR)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: broken JSON list ({one_line(error)}).") from error
        value = [item.strip() if isinstance(item, str) else item for item in value]
    if not isinstance(value, list | tuple):
        raise TaskError(f"{where} must be a list of texts, got {value!r:.40}.")
    return tuple(str(item) for item in value)
