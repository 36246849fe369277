"""Loading tasks: files, the Hub, rows in memory, and prompt templates.

Templates that users write have promptsource's notation, `input ||| target` in jinja2.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from ..config import TASK_FILES
from ..errors import TaskError
from ..files import first_line, half_character, one_line, reason, require_regular, shortened
from .forms import KNOWN, in_our_form, stripped_answers, template_for
from .task import Chat, Example, Span, Task

SEPARATOR = "|||"
TEMPLATE_FAILURES = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError),
    *(MemoryError, RecursionError, TypeError, ValueError),
)


class RowTemplate:
    """Templates that make a row's input, target and choices from its fields.

    Raises TaskError for templates of another form.
    """

    def __init__(self, template: str | None, choices: str | None) -> None:
        environment = SandboxedEnvironment(undefined=StrictUndefined, finalize=_printed)
        for name, text in (("template", template), ("choices", choices)):
            if not isinstance(text, str | None):
                raise TaskError(
                    f"{name} is {shortened(text)}, but must be a text such as 'yes {SEPARATOR} no'."
                )
        if template is not None and template.count(SEPARATOR) != 1:
            raise TaskError(f"template must have the form 'input {SEPARATOR} target'.")
        try:
            parts = template.split(SEPARATOR) if template else []
            self._parts = [environment.from_string(part) for part in parts]
            self._choices: Template | None = environment.from_string(choices) if choices else None
        except TemplateError as error:
            raise TaskError(f"template is not valid jinja2: {error}.") from error

    def render(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
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
        return stripped_answers(rendered) if self._parts or self._choices else rendered


def _printed(value: Any) -> Any:
    if value is None:
        raise TemplateError("a field that it prints is empty")
    return value


def longest_field(
    row: Mapping[str, Any], text: str, shown: Callable[[str], str] = str
) -> Span | None:
    """Where `text` holds the longest value of `row` that occurs in it exactly once, or None.

    Values inside lists and dicts count individually. `shown` maps a value to its printed form.
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


EMPTY = ("nan", "<NA>", "NaT")  # cells without a value: of floats, of pandas, of its dates
PLAIN = (str, int, list, tuple, dict)  # what is no such cell
SPLITS = ("train", "validation", "test")
LONGEST_CELL = 2**31 - 1  # characters in a CSV file; a C long of Windows holds no more
FILES = f"{', '.join(TASK_FILES[:-1])} or {TASK_FILES[-1]} file"
NO_TASK = f"A task is a Task, a {FILES}, or hub:DATASET"
Rows = Iterator[tuple[str, Mapping[str, Any]]]  # each with its place, for messages


def load_task(
    source: str | Path | Iterable[Mapping[str, Any]] | Mapping[str, Any],
    *,
    name: str | None = None,
    template: str | None = None,
    choices: str | None = None,
    targets: bool = True,
) -> Task:
    """The task in `source`.

    Rows have the fields `input`, `target`, and optionally `choices`, `references` and `split`
    (train, validation or test; train when absent). Instead of the first two they may have
    `messages` (the last is the target, the others become a `Chat`), `prompt` and `completion`, or
    `instruction`, `input` and `output`.

    Args:
        source: A `.jsonl`, `.json` (a list of rows, an object of columns or of lists by split, or
            JSON Lines), `.csv` or `.parquet` file, `hub:ID`, `hub:ID:CONFIG` or either with
            `@REVISION` (read with the `datasets` library), or rows in memory: dicts, a dict of
            columns, a `DataFrame`, a table of pyarrow, a `Dataset`, or a dict of any of these by
            split, such as a `DatasetDict`. Splits of it that aren't among the three are left out
            with a warning.
        name: The task's name; None is the file's stem.
        template: "input ||| target", jinja2, as in promptsource: renders both from whatever fields
            a row has.
        choices: "yes ||| no", jinja2: renders the choices.
        targets: False lets rows have no target, which is then empty.

    Raises:
        TaskError: Naming the line, for anything else, a row that is broken or lacks a field, a text
            that holds half a character, an empty choice, a target that is not among the choices, a
            name that isn't UTF-8, or a source without examples.
    """
    rows, label, default_name = _open_source(source)
    if not isinstance(name, str | None):
        raise TaskError(f"name is {shortened(name)}, but must be a text.")
    for each in (name or default_name, label):
        check_task_name(each)
    row_template = RowTemplate(template, choices)
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for where, row in rows:
        row = {name: _plain(value) for name, value in row.items()}
        split = row.get("split") or "train"
        if not isinstance(split, str) or split not in splits:
            raise TaskError(
                f"{where}: split is {shortened(split)}, but must be {', '.join(SPLITS)}."
            )
        filled = row_template.render(row, where)
        filled = filled if template else in_our_form(filled, where)
        example = _example(filled, where, targets=targets)
        passage = longest_field(row, example.input) if template else None
        splits[split].append(replace(example, passage=passage))
    if not any(splits.values()):
        place = source if isinstance(source, str | Path) else label
        raise TaskError(f"{place} has no examples.")
    train, validation, test = (tuple(splits[split]) for split in SPLITS)
    return Task(name or default_name, train, validation, test, source=label)


def given_tasks(given: Task | str | Path | Iterable[Task | str | Path]) -> list[Task]:
    """The tasks that a caller names: one or several, each a Task, a file or `hub:DATASET`."""
    alone = isinstance(given, Task | str | Path)
    if not alone and (_is_frame(given) or isinstance(given, Mapping)):
        raise TaskError(f"{NO_TASK}, not a {type(given).__name__}; load_task makes a Task of that.")
    each: Any = [given] if alone else given
    try:
        return [task if isinstance(task, Task) else _named(task) for task in each]
    except TypeError as error:
        if hasattr(given, "__iter__"):
            raise
        raise TaskError(f"{NO_TASK}, not {shortened(given)}.") from error


def given_task(given: Task | str | Path) -> Task:
    """A Task as it is, or the one that a path or name stands for."""
    return given if isinstance(given, Task) else _named(given)


def _named(task: object) -> Task:
    if not isinstance(task, str | Path):
        raise TaskError(f"{NO_TASK}, not {shortened(task)}; load_task makes a Task of rows.")
    return load_task(task)


def check_task_name(name: str) -> None:
    """Raise TaskError for a name that no file of results can hold."""
    if half_character(name) is not None:
        raise TaskError(
            f"{shortened(name)} can't be a name in results, for it is not UTF-8; rename that file "
            f"or folder."
        )


def default_name(source: str | Path) -> str:
    """A task's name if its user gives none: the file's, or the Hub's with dashes."""
    if isinstance(source, str) and source.startswith("hub:"):
        return source[4:].split("@")[0].replace("/", "--").replace(":", "--")
    return Path(source).stem


def _open_source(source: str | Path | Iterable[Any]) -> tuple[Rows, str, str]:
    """(rows, the source's name in messages and records, a name for the task)."""
    if isinstance(source, str) and source.startswith("hub:"):
        return _read_hub(source), source, default_name(source)
    if not isinstance(source, str | Path):
        return _read_memory(source), "memory", "task"
    path = Path(source)
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise TaskError(f"Task {path} must be a {FILES}, or hub:DATASET.")
    try:
        require_regular(path, TaskError, f"Task file {one_line(path, 140)}")
    except FileNotFoundError as error:
        raise TaskError(f"Task file {path} does not exist.") from error
    return readers[path.suffix](path), path.name, default_name(path)


def _read_jsonl(path: Path) -> Rows:
    try:
        with path.open(encoding="utf-8-sig") as lines:  # str.splitlines would split at U+2028 too
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise TaskError(f"{where}: broken JSON ({one_line(error)}).") from error
                if not isinstance(row, dict):
                    raise TaskError(f"{where}: wanted an object with fields, got {line[:40]!r}.")
                yield where, row
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"Task file {path} can't be read: {reason(error)}.") from error


def _read_json(path: Path) -> Rows:
    """The rows of a JSON list or an object of columns or splits; else one row, or JSON Lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"Task file {path} can't be read: {reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("["):
            return _read_jsonl(path)
        raise TaskError(f"{path}: broken JSON ({one_line(error)}).") from error
    if isinstance(rows, dict) and not _are_lists(rows):
        return _read_memory([rows], str(path)) if "\n" in text.strip() else _read_jsonl(path)
    return _read_memory(rows, str(path))


def _are_lists(rows: Mapping[str, Any]) -> bool:
    """True for an object of splits or of columns, False for a row, which may be a chat's."""
    listed = all(isinstance(each, list) for each in rows.values())
    return listed and (rows.keys() <= set(SPLITS) or _are_columns(rows))


def _read_parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise TaskError(f"{path} needs pyarrow: pip install 'phatgoose[datasets]'.") from error
    try:
        with ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            yield from _read_memory((row for batch in batches for row in batch), str(path))
    except (OSError, ArrowException) as error:
        raise TaskError(f"Task file {path} can't be read: {first_line(error)}.") from error


def _read_csv(path: Path) -> Rows:
    try:
        # The library's own limit is 131,072 characters; long documents have more.
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            try:
                _require_different(filter(None, reader.fieldnames or ()), path)
                for row in reader:
                    where = f"{path}, line {reader.line_num}"
                    if None in row:  # where DictReader puts what is beyond the header
                        raise TaskError(
                            f"{where}: more cells than the header names; put a text that holds a "
                            f"comma in double quotes."
                        )
                    yield where, row
            except csv.Error as error:
                raise TaskError(
                    f"{path}, the row from line {reader.line_num + 1}: broken CSV ({error}); a "
                    f"cell that begins with a quote must end with one, and quotes within it are "
                    f"doubled."
                ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"Task file {path} can't be read: {reason(error)}.") from error


def _require_different(names: Iterable[Any], where: str | Path) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise TaskError(
                f"{where}: {count} columns are named {shortened(name)}; give them different names."
            )


def _read_hub(source: str) -> Rows:
    datasets = datasets_library(source)
    address, _, revision = source.removeprefix("hub:").partition("@")
    dataset, _, config = address.partition(":")
    try:
        loaded = datasets.load_dataset(dataset, config or None, revision=revision or None)
    except Exception as error:  # datasets documents no common base class for what it raises
        raise TaskError(f"{source} can't be loaded: {first_line(error)}.") from error
    yield from _read_memory(loaded, source)


def datasets_library(needed_for: object) -> Any:
    """`datasets`. Raises TaskError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"{needed_for} needs datasets: pip install 'phatgoose[datasets]'."
        ) from error
    return datasets


def _read_memory(rows: Any, label: str = "memory") -> Rows:
    parts: list[tuple[str, str, Any, dict[str, str]]] = [(label, f"{label},", rows, {})]
    if isinstance(rows, Mapping) and not _are_columns(rows):  # a DatasetDict: split name -> rows
        unknown = ", ".join(str(split) for split in rows if split not in SPLITS)
        if unknown:
            warnings.warn(f"{label}: splits left out: {unknown}.", stacklevel=4)
        places = {split: f"{label}, {split}" for split in SPLITS}
        parts = [
            (place, place, rows.get(split, ()), {"split": split}) for split, place in places.items()
        ]
    for place, before, part, split in parts:
        for number, row in enumerate(_rows_of(part, place), 1):
            where = f"{before} row {number}"
            if not isinstance(row, Mapping):
                raise TaskError(f"{where}: wanted a dict with fields, got {row!r:.40}.")
            yield where, {**row, **split}


def _rows_of(rows: Any, label: str) -> Iterable[Any]:
    if isinstance(rows, Mapping):
        return _rows_of_columns(rows, label)
    if hasattr(rows, "to_pylist"):  # a table of pyarrow
        rows = rows.to_pylist()
    if not _is_frame(rows):
        if isinstance(rows, str | bytes | Task) or not hasattr(rows, "__iter__"):
            raise TaskError(
                f"{label}: wanted rows (dicts, a dict of columns or a DataFrame), a file, or "
                f"hub:DATASET, got {shortened(rows)}."
            )
        found: Iterable[Any] = rows
        return found
    _require_different(rows.columns, label)
    return _rows_of_columns({name: rows[name] for name in rows.columns}, label)


def _rows_of_columns(columns: Mapping[str, Any], label: str) -> Iterator[dict[str, Any]]:
    for name, cells in columns.items():
        if isinstance(cells, str | bytes) or not hasattr(cells, "__len__"):
            raise TaskError(
                f"{label}: {name} is {shortened(cells)}, but a dict holds a column of cells for "
                f"each field, or the rows of each split ({', '.join(SPLITS)}); put a single row "
                f"into a list."
            )
    lengths = {str(name): len(cells) for name, cells in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise TaskError(f"{label}: the columns have different numbers of cells: {told}.")
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _are_columns(rows: Mapping[Any, Any]) -> bool:
    if any(name in SPLITS or _is_frame(held) for name, held in rows.items()):
        return False
    cells = [next(iter(held), None) for held in rows.values() if hasattr(held, "__iter__")]
    return not cells or not all(isinstance(cell, Mapping) for cell in cells)


def _is_frame(rows: Any) -> bool:
    """True for a DataFrame, of pandas or another library, which need not be installed."""
    return hasattr(rows, "columns") and hasattr(rows, "__getitem__") and hasattr(rows, "__len__")


def _example(row: Mapping[str, Any], where: str, *, targets: bool) -> Example:
    texts = {}
    for key in ("input", "target"):
        value = row.get(key)
        if isinstance(value, list | dict):
            raise TaskError(f"{where}: {key} must be a text, got {shortened(value)}.")
        if value is None or not str(value).strip():
            if key == "input" or targets:
                raise TaskError(f"{where}: {key} is missing or empty; {_what_is_there(row)}")
            value = ""
        text = _whole(str(value), f"{where}: {key}")
        texts[key] = value if isinstance(value, Chat) else text
    choices = _texts(row.get("choices"), f"{where}: choices")
    references = _texts(row.get("references"), f"{where}: references")
    for what, listed in (("choice", choices), ("reference", references)):
        empty = next((place for place, text in enumerate(listed, 1) if not text.strip()), None)
        if empty is not None:
            raise TaskError(
                f"{where}: {what} {empty} of {len(listed)} is empty; leave it out "
                f"(a {SEPARATOR} without a text before or after it makes one)."
            )
    if choices and texts["target"] not in choices and (targets or texts["target"]):
        raise TaskError(
            f"{where}: target {texts['target']!r} is not among the choices {list(choices)}."
        )
    return Example(texts["input"], texts["target"], choices, references)


def _what_is_there(row: Mapping[str, Any]) -> str:
    fields = one_line(", ".join(map(str, row)) or "none")
    found, template = f"the fields there are {fields}.", template_for(row)
    if template is None:
        return found
    return f"{found} Known are {KNOWN}; a template reads others: --template '{template}'."


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts; a CSV cell holds it as JSON or separated by |||."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = [item.strip() if isinstance(item, str) else item for item in _listed(value, where)]
    if not isinstance(value, list | tuple):
        raise TaskError(f"{where} must be a list of texts, got {value!r:.40}.")
    items = [_plain(item) for item in value]
    return tuple(_whole("" if item is None else str(item), where) for item in items)


def _plain(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if not isinstance(value, PLAIN) and str(value) in EMPTY else value


def _listed(cell: str, where: str) -> list[Any]:
    looks_like_json = cell.startswith("[") and cell.rstrip().endswith("]")
    try:
        return list(json.loads(cell)) if looks_like_json else cell.split(SEPARATOR)
    except (ValueError, RecursionError) as error:
        if SEPARATOR in cell:  # "[yes] ||| [no]"
            return cell.split(SEPARATOR)
        raise TaskError(f"{where}: broken JSON list ({one_line(error)}).") from error


def _whole(text: str, where: str) -> str:
    half = half_character(text)
    if half is not None:
        raise TaskError(
            f"{where} holds {half!r}, half a character, as where a text was cut within an emoji; "
            f"mend that text or leave the row out."
        )
    return text
