"""Loading tasks: files, the Hub, rows in memory, and prompt templates.

Rows come from anywhere. They are checked here, and nowhere else. Templates that users write have
promptsource's notation, `input ||| target` in jinja2. Chats (`messages`), prompt and completion,
and instruction, input and output are what TRL, OpenAI's fine-tuning and Alpaca call them.
"""

from __future__ import annotations

import csv
import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from ..config import TASK_FILES
from ..errors import TaskError
from ..files import first_line, half_character, one_line, reading, regular, shortened
from .task import Chat, Example, Sources, Span, Task

SEPARATOR = "|||"
TEMPLATE_FAILURES = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError),
    *(MemoryError, RecursionError, TypeError, ValueError),
)
EMPTY = ("nan", "<NA>", "NaT")  # cells without a value: of floats, of pandas, of its dates
PLAIN = (str, int, list, tuple, dict)  # what is no such cell
SPLITS = ("train", "validation", "test")
LONGEST_CELL = 2**31 - 1  # characters in a CSV file; a C long of Windows holds no more
HUB = "hub:"
PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own export of datasets that need a script
FILES = f"{', '.join(TASK_FILES[:-1])} or {TASK_FILES[-1]} file"
FORMS = (
    "input and target; messages; prompt and completion; or instruction, input (optional) and output"
)
Rows = Iterator[tuple[str, Any]]  # each with its place, for messages


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
    templates = _compiled(template, choices)
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    rows, label = _in_memory(source, "memory"), "memory"
    if isinstance(source, str | Path):
        name, label = name or default_name(source), Path(source).name
        rows = _in_file(Path(source))
        if str(source).startswith(HUB):
            rows, label = _on_hub(str(source)), str(source)
    name = name or "task"
    for text in (label, name):
        whole_text(text, f"The name {shortened(text)}")
    for where, row in rows:
        try:
            split, example = _example(row, templates, targets)
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from error
        splits[split].append(example)
    if not any(splits.values()):
        raise TaskError(f"{label} has no examples.")
    parts: dict[str, Any] = {split: tuple(examples) for split, examples in splits.items()}
    return Task(name, **parts, source=label)


def given_tasks(given: Task | str | Path | Iterable[Task | str | Path]) -> list[Task]:
    """The tasks that a caller names: one or several, each a Task, a file or `hub:DATASET`."""
    given = [given] if isinstance(given, Task | str | Path) else given
    return [given_task(each) for each in given]


def given_task(given: Task | str | Path) -> Task:
    """A Task as it is, or the one that a path or name stands for."""
    return given if isinstance(given, Task) else load_task(given)


def default_name(source: str | Path) -> str:
    """A task's name if its user gives none: the file's, or the Hub's with dashes."""
    if isinstance(source, str) and source.startswith(HUB):
        return source.removeprefix(HUB).split("@")[0].replace("/", "--").replace(":", "--")
    return Path(source).stem


def whole_text(text: str, what: str) -> str:
    """`text`. Raises TaskError if UTF-8 can't encode it: no file of ours could hold it."""
    half = half_character(text)
    if half is not None:
        raise TaskError(f"{what} holds {half!r}, half a character, which is not UTF-8.")
    return text


# Where rows come from


def _in_file(path: Path) -> Rows:
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise TaskError(f"Task {path} must be a {FILES}, or hub:DATASET.")
    with reading(f"Task file {one_line(path, 140)}", TaskError):
        yield from readers[path.suffix](regular(path))


def _json_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as lines:  # str.splitlines would split at U+2028 too
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                if line.strip():
                    yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{where}: broken JSON ({one_line(error)}).") from error


def _json(path: Path) -> Rows:
    """The rows of a JSON list, or of an object of columns or splits; else JSON Lines."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError:
        if text.lstrip().startswith("["):
            raise
        return _json_lines(path)
    is_row = isinstance(content, dict) and not all(isinstance(v, list) for v in content.values())
    return _in_memory([content] if is_row else content, str(path))


def _csv(path: Path) -> Rows:
    csv.field_size_limit(LONGEST_CELL)  # the library's own is 131,072; long documents have more
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = [name for name in reader.fieldnames or () if name]
        if len(set(names)) < len(names):
            raise TaskError(f"{path}: two columns have one name among {', '.join(names)}.")
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:  # where DictReader puts what is beyond the header
                    raise TaskError(
                        f"{where}: more cells than the header names; quote texts that hold a comma."
                    )
                yield where, row
        except csv.Error as error:
            raise TaskError(
                f"{path}, the row from line {reader.line_num + 1}: broken CSV ({error})."
            ) from error


def _parquet(path: Path) -> Rows:
    with _library("pyarrow.parquet", path).ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        yield from _in_memory(rows, str(path))


def _in_memory(rows: Any, label: str) -> Rows:
    if isinstance(rows, Mapping) and any(split in rows for split in SPLITS):  # a DatasetDict, too
        unknown = ", ".join(str(split) for split in rows if split not in SPLITS)
        if unknown:
            warnings.warn(f"{label}: splits left out: {unknown}.", stacklevel=4)
        for split in SPLITS:
            for where, row in _in_memory(rows.get(split, ()), f"{label}, {split}"):
                yield where, {**row, "split": split}
        return
    if hasattr(rows, "to_pylist"):  # a table of pyarrow
        rows = rows.to_pylist()
    elif hasattr(rows, "columns"):  # a DataFrame, of pandas or another library
        rows = {name: rows[name] for name in rows.columns}
    if isinstance(rows, Mapping):
        names, cells = list(rows), zip(*rows.values(), strict=True)
        rows = (dict(zip(names, row, strict=True)) for row in cells)
    for number, row in enumerate(rows, 1):
        yield f"{label}, row {number}", row


def _on_hub(source: str) -> Rows:
    library = _library("datasets", source)
    address, _, revision = source.removeprefix(HUB).partition("@")
    dataset, _, config = address.partition(":")
    try:
        loaded = library.load_dataset(dataset, config or None, revision=revision or None)
    except Exception as error:  # as in read_rows
        raise TaskError(f"{source} can't be loaded: {first_line(error)}.") from error
    yield from _in_memory(loaded, source)


def _library(name: str, needed_for: object) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"{needed_for} needs {name}: pip install 'phatgoose[datasets]'.") from error


def read_rows(
    sources: Sources, dataset: str, config: str | None, split: str
) -> Sequence[Mapping[str, Any]]:
    """The rows of one split of the Hub dataset `dataset` ("OWNER/NAME" or "NAME").

    With `sources.data` they come from its copy there, otherwise from the Hub, those of datasets
    that need a script from its parquet export. `config` is a configuration's name, or a folder of
    the repository that `save_to_disk` wrote. Nothing that is read is ever executed or unpickled:
    `datasets` runs no scripts from version 4 on.

    Rows are read on access (`rows[i]`, or iterate); class labels stay numbers. Raises TaskError for
    a missing library, dataset, configuration or split, and an unreadable file.
    """
    what = f"Split {split} of dataset {dataset}" + f" (configuration {config})" * bool(config)
    library = _library("datasets", what)
    copy = None if sources.data is None else (sources.data / dataset).absolute()
    if copy is not None and not copy.is_dir():
        raise TaskError(
            f"{what} isn't there: wanted a copy of its repository in {copy}, as made by: hf "
            f"download --repo-type dataset {dataset} --local-dir {copy}"
        )
    try:
        rows = _split(library, copy, dataset, config, split)
    except Exception as error:  # datasets documents no common base class for what it raises
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise TaskError(
            f"{what} can't be loaded from {copy or 'the Hub'}: {first_line(cause)}. Of datasets "
            f"with a script, copy revision {PARQUET_REVISION}."
        ) from error
    return cast(Sequence[Mapping[str, Any]], rows.with_format(None))  # plain Python values


def _split(library: Any, copy: Path | None, dataset: str, config: str | None, split: str) -> Any:
    if copy is None and config and "/" in config:  # a folder of the repository
        from huggingface_hub import snapshot_download  # slow to import

        files = [f"{config}/*"]
        copy = Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=files))
    exported = f"{config or '*'}/{split}/*.parquet"
    if copy is None:
        try:
            return library.load_dataset(dataset, config, split=split)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
        # Not by the dataset's name, by which datasets would take it from its cache the next time.
        files = [f"hf://datasets/{dataset}@{PARQUET_REVISION}/{exported}"]
        return library.load_dataset("parquet", data_files={split: files}, split=split)
    folder, readme = copy / (config or ""), copy / "README.md"
    if (folder / "dataset_dict.json").is_file():
        return library.load_from_disk(str(folder))[split]
    if readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8"):
        return library.load_dataset(str(copy), config, split=split)
    if files := [str(file) for file in copy.glob(exported)]:
        return library.load_dataset("parquet", data_files={split: files}, split=split)
    return library.load_dataset(str(folder), split=split)


def examples_of(
    rows: Iterable[Mapping[str, Any]], where: str, make: Callable[[Any], Example | None]
) -> Iterator[Example]:
    """What `make` makes of `rows`, but for None. Raises TaskError where it can't, with the row."""
    for number, row in enumerate(rows, 1):
        try:
            example = make(row)
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__} ({error}); its fields are {', '.join(row)}"
            raise TaskError(f"{where} row {number}: {reason}.") from error
        if example is not None:
            yield example


# From a row to an example


def _compiled(template: str | None, choices: str | None) -> dict[str, Template]:
    """The templates of the fields that are rendered; choices come first, others may name them."""
    environment = SandboxedEnvironment(undefined=StrictUndefined, finalize=_printed)
    texts = {"choices": choices} if choices else {}
    if template is not None:
        texts["input"], *rest = template.split(SEPARATOR)
        if len(rest) != 1:
            raise TaskError(f"template must have the form 'input {SEPARATOR} target'.")
        texts["target"] = rest[0]
    try:
        return {key: environment.from_string(text) for key, text in texts.items()}
    except TemplateError as error:
        raise TaskError(f"template is not valid jinja2: {error}.") from error


def _rendered(row: Mapping[str, Any], templates: Mapping[str, Template]) -> dict[str, Any]:
    rendered = dict(row)
    try:
        for key, template in templates.items():
            text = template.render({**row, "answer_choices": rendered.get("choices")})
            parts = [part.strip() for part in text.split(SEPARATOR)]
            rendered[key] = parts if key == "choices" else text.strip()
    except TEMPLATE_FAILURES as error:
        raise TaskError(f"the template can't be filled: {error}.") from error
    return rendered


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


def _example(row: Any, templates: Mapping[str, Template], targets: bool) -> tuple[str, Example]:
    """(split, example) of a row."""
    if not isinstance(row, Mapping):
        raise TaskError(f"wanted an object with fields, got {shortened(row, 40)}.")
    row = {name: _plain(value) for name, value in row.items()}
    filled = _rendered(row, templates)
    filled = filled if "input" in templates else _in_our_form(filled)
    split = row.get("split") or "train"
    if split not in SPLITS:
        raise TaskError(f"split is {shortened(split)}, but must be {', '.join(SPLITS)}.")
    if templates:
        filled |= {key: _stripped(filled.get(key)) for key in ("target", "choices", "references")}
    text, target = (_text(filled.get(key), key) for key in ("input", "target"))
    if not text.strip() or (targets and not target.strip()):
        fields = one_line(", ".join(map(str, row)) or "none")
        raise TaskError(
            f"{'target' if text.strip() else 'input'} is missing or empty; the fields there are "
            f"{fields}. Wanted {FORMS}, or a template that reads others."
        )
    choices, references = (_texts(filled.get(key), key) for key in ("choices", "references"))
    if choices and target not in choices and (targets or target):
        raise TaskError(f"target {target!r} is not among the choices {list(choices)}.")
    passage = longest_field(row, text) if "input" in templates else None
    return split, Example(text, target, choices, references, passage)


def _stripped(answers: Any) -> Any:
    if isinstance(answers, list | tuple):
        return [_stripped(each) for each in answers]
    return answers.strip() if isinstance(answers, str) else answers


def _in_our_form(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with input and target, if it has another program's form; turns become a Chat."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("target") is not None:
        return row
    if row.get("messages") is not None:
        turns = _turns(row["messages"])
    elif isinstance(prompt, list) and isinstance(completion, list):
        turns = _turns([*prompt, *completion])
    elif prompt is not None and completion is not None:
        # What follows a prompt is set off by a space of ours.
        answers = {key: _stripped(row.get(key)) for key in ("choices", "references")}
        return {**row, **answers, "input": str(prompt), "target": str(completion).strip()}
    elif row.get("instruction") is not None and "output" in row:
        asked = (row.get(name) for name in ("instruction", "input"))
        parts = (str(part).strip() for part in asked if part is not None)
        return {**row, "input": "\n\n".join(filter(None, parts)), "target": row["output"]}
    else:
        return row
    *before, (role, answer) = turns or [("none", "")]
    if role != "assistant" or not any(content.strip() for _, content in before):
        raise TaskError("messages must end with what the assistant answers to others.")
    return {**row, "input": Chat(before), "target": answer}


def _turns(messages: Any) -> list[tuple[str, str]]:
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        fields = message if isinstance(message, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if isinstance(content, list):  # OpenAI's parts
            texts: list[Any] = [isinstance(part, dict) and part.get("text") for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(role, str) or not isinstance(content, str) or fields.get("tool_calls"):
            raise TaskError(
                f"a message must have a role and a content of text, which tool calls and pictures "
                f"are not; got {shortened(message)}."
            )
        turns.append((role, content))
    return turns


def _text(value: Any, what: str) -> str:
    if isinstance(value, list | tuple | dict):
        raise TaskError(f"{what} must be a text, got {shortened(value)}.")
    text = "" if value is None else str(value)
    return value if isinstance(whole_text(text, what) and value, Chat) else text


def _texts(value: Any, what: str) -> tuple[str, ...]:
    """A list of texts; a CSV cell holds it as JSON or separated by |||."""
    if isinstance(value, str):
        cell = value.strip()
        value = _stripped(cell.split(SEPARATOR)) if cell else ()
        if cell.startswith("[") and cell.endswith("]"):
            try:
                value = _stripped(json.loads(cell))
            except (ValueError, RecursionError) as error:
                if SEPARATOR not in cell:  # as in "[yes] ||| [no]"
                    raise TaskError(f"{what}: broken JSON list ({one_line(error)}).") from error
    if not isinstance(value or (), list | tuple):
        raise TaskError(f"{what} must be a list of texts, got {shortened(value)}.")
    texts = tuple(_text(_plain(item), what) for item in value or ())
    if not all(text.strip() for text in texts):
        raise TaskError(f"one of the {what} {list(texts)} is empty; leave it out.")
    return texts


def _plain(value: Any) -> Any:
    """`value` without numpy and pandas; None for a cell without one."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if not isinstance(value, PLAIN) and str(value) in EMPTY else value
