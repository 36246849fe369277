"""Loading tasks: files, the Hub, rows in memory, and prompt templates.

Rows come from anywhere. They are checked here, and nowhere else. Templates that users write have
promptsource's notation, `input ||| target` in jinja2. Chats (`messages`), prompt and completion,
and instruction, input and output are what TRL, OpenAI's fine-tuning and Alpaca call them.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml  # type: ignore[import-untyped]
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, TypeAdapter

from ..config import TASK_FILES
from ..errors import TaskError
from ..files import first_line, half_character, one_line, reading, regular, regular_file, shortened
from ..names import HUB
from .task import Chat, Example, Sources, Task, request_in

SEPARATOR = "|||"
TEMPLATE_FAILURES = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError),
    *(MemoryError, RecursionError, TypeError, ValueError),
)
SPLITS = ("train", "validation", "test")
LONGEST_CELL = 2**31 - 1  # characters in a CSV file; a C long of Windows holds no more
LINES = ".txt"  # a prompt a line
PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own export of datasets that need a script
FILES = f"{', '.join(TASK_FILES[:-1])} or {TASK_FILES[-1]} file"
FORMS = "input and target; messages; prompt and completion; or instruction, input and output"
Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Any]]  # each with its place, for messages


def load_task(
    source: str | Path | Iterable[Row] | Row,
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
    `instruction`, `input` (may be absent) and `output`.

    Args:
        source: A `.jsonl`, `.json` (a list of rows, or an object of lists by split), `.csv` or
            `.parquet` file, `hub:ID`, `hub:ID:CONFIG` or either with `@REVISION` (read with the
            `datasets` library), or rows in memory: dicts, a `Dataset`, or a dict of either by
            split, such as a `DatasetDict`. Splits of it that aren't among the three are left out
            with a warning.
        name: The task's name; None is the file's stem.
        template: "input ||| target", jinja2, as in promptsource: renders both from whatever fields
            a row has.
        choices: "yes ||| no", jinja2: renders the choices.
        targets: False lets rows have no target, which is then empty: a `prompt` alone, or
            `messages` that end with the user's.

    Raises:
        TaskError: Naming the line, for anything else, a row that is broken or lacks a field, a text
            that holds half a character, an empty choice, a target that is not among the choices, or
            a source without examples.
    """
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    place = "memory"
    label = place
    if not isinstance(source, str | Path):
        rows = _in_memory(source, label)
    else:
        name = name or default_name(source)
        place = one_line(source, 140)
        if str(source).startswith(HUB):
            rows = _on_hub(str(source))
            label = str(source)
        else:
            rows = _in_file(Path(source))
            label = one_line(Path(source).name)
    with reading(f"The template, in the form 'input {SEPARATOR} target',", TaskError):
        templates = _compiled(template, choices)
    with reading(place, TaskError):
        for place, row in rows:
            with reading(place, TaskError):
                split, example = _example(row, templates, targets)
            splits[split].append(example)
    if not any(splits.values()):
        raise TaskError(f"{label} has no examples.")
    train, validation, test = map(tuple, splits.values())
    return Task(name or "task", train, validation, test, label)


def load_prompts(places: Iterable[str]) -> Task:
    """The task without targets of the prompts in `places`, of chats the user's last message.

    Raises what `read_inputs` does.
    """
    inputs = read_inputs(places)
    return Task("prompts", tuple(Example(request_in(text), "") for text in inputs))


def read_inputs(places: Iterable[str]) -> list[str]:
    """The prompts in `places`, of which some may be a `Chat`.

    Each place is a prompt or a file of some: a .txt with one a line, or a task's. Raises TaskError
    for a file that can't be read or has no prompts, and an empty prompt.
    """
    prompts = list[str]()
    for place in places:
        path = Path(place)
        is_named = path.suffix in (LINES, *TASK_FILES) and len(place.split()) == 1
        if not (is_named or os.path.isfile(place)):
            prompts.append(place)
        elif path.suffix in TASK_FILES:
            prompts += inputs_in(load_task(path, targets=False))
        else:
            with reading(one_line(place), TaskError):
                lines = regular(path).read_text(encoding="utf-8-sig").split("\n")
            prompts += filter(None, map(str.strip, lines))
    if not prompts or not all(map(str.strip, prompts)) or half_character("".join(prompts)):
        raise TaskError(f"{shortened([*places])}: no prompts, or one is empty or not in UTF-8.")
    return prompts


def inputs_in(task: Task) -> list[str]:
    examples = (*task.train, *task.validation, *task.test)
    return [example.input for example in examples]


def given_tasks(source: Task | str | Path | Iterable[Task | str | Path]) -> list[Task]:
    """The tasks that a caller names: one or several, each a Task, a file or `hub:DATASET`.

    Raises TaskError for none.
    """
    if isinstance(source, Task):
        return [source]
    if isinstance(source, str | Path):
        return [load_task(source)]
    tasks = []
    for part in source:
        tasks += given_tasks(part)
    if not tasks:
        raise TaskError("No task is given.")
    return tasks


def default_name(source: str | Path) -> str:
    """A task's name if its user gives none: the file's, or the Hub's with dashes."""
    if isinstance(source, str) and source.startswith(HUB):
        return source.removeprefix(HUB).split("@")[0].replace("/", "--").replace(":", "--")
    return one_line(Path(source).stem)  # which may hold bytes that aren't UTF-8


# Where rows come from


def _in_file(path: Path) -> Rows:
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise TaskError(f"Task {path} must be a {FILES}, or hub:DATASET.")
    yield from readers[path.suffix](regular(path))


def _json_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as lines:  # str.splitlines would split at U+2028 too
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}, line {number}", line


def _json(path: Path) -> Rows:
    return _in_memory(json.loads(path.read_text(encoding="utf-8-sig")), str(path))


def _csv(path: Path) -> Rows:
    csv.field_size_limit(LONGEST_CELL)  # the library's own is 131,072; long documents have more
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row:  # where DictReader puts what is beyond the header
                raise ValueError(
                    f"line {reader.line_num} has more cells than the header names; quote texts "
                    f"with a comma"
                )
            yield f"{path}, line {reader.line_num}", row


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
    for number, row in enumerate(rows, 1):
        yield f"{label}, row {number}", row


def _on_hub(source: str) -> Rows:
    library = _library("datasets", source)
    address, _, revision = source.removeprefix(HUB).partition("@")
    dataset, _, config = address.partition(":")
    loaded = library.load_dataset(dataset, config or None, revision=revision or None)
    yield from _in_memory(loaded, source)


def _library(name: str, needed_for: object) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"{needed_for} needs {name}: pip install 'phatgoose[datasets]'.") from error


def read_rows(sources: Sources, dataset: str, config: str | None, split: str) -> Sequence[Row]:
    """The rows of one split of the Hub dataset `dataset` ("OWNER/NAME" or "NAME").

    With `sources.data` they come from its copy there, otherwise from the Hub, those of datasets
    that need a script from its parquet export. `config` is a configuration's name, or a folder of
    the repository that `save_to_disk` wrote. Nothing that is read is ever executed or unpickled:
    `datasets` runs no scripts from version 4 on.

    Rows are read on access (`rows[i]`, or iterate); class labels stay numbers. Raises TaskError for
    a missing library, dataset, configuration or split, and an unreadable file.
    """
    what = f"Split {split} of dataset {dataset}"
    if config:
        what += f" (configuration {config})"
    library = _library("datasets", what)
    copy = None if sources.data is None else (sources.data / dataset).absolute()
    try:
        rows = _split(library, copy, dataset, config, split)
    except Exception as error:  # datasets documents no common base class for what it raises
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise TaskError(
            f"{what} can't be loaded from {copy or 'the Hub'}: {first_line(cause)}. A copy is made "
            f"by: hf download --repo-type dataset {dataset} --local-dir {copy or 'FOLDER'}, of a "
            f"dataset with a script with --revision {PARQUET_REVISION}."
        ) from error
    return cast(Sequence[Row], rows.with_format(None))  # plain Python values


def _split(library: Any, copy: Path | None, dataset: str, config: str | None, split: str) -> Any:
    if copy is None and config and "/" in config:  # a folder of the repository
        from huggingface_hub import snapshot_download  # slow to import

        files = [f"{config}/*"]
        copy = Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=files))
    exported = f"{config or '*'}/{split}/*.parquet"
    place = str(copy)
    if copy is None:
        try:
            return library.load_dataset(dataset, config, split=split)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
        # Not by the dataset's name, by which datasets would take it from its cache the next time.
        place = f"hf://datasets/{dataset}@{PARQUET_REVISION}"
    else:
        folder = copy / (config or "")
        readme = copy / "README.md"
        if (folder / "dataset_dict.json").is_file():
            return library.load_from_disk(str(folder))[split]
        if readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8"):
            return library.load_dataset(str(copy), config, split=split)
        if not any(copy.glob(exported)):
            return library.load_dataset(str(folder), split=split)
    return library.load_dataset("parquet", data_files={split: f"{place}/{exported}"}, split=split)


def examples_of(
    rows: Iterable[Row], where: str, make: Callable[[Any], Example | None]
) -> Iterator[Example]:
    """What `make` makes of `rows`, but for None. Raises TaskError where it can't, with the row."""
    for number, row in enumerate(rows, 1):
        with reading(f"{where}, row {number}", TaskError):
            example = make(row)
        if example is not None:
            yield example


# The prompts that an adapter brings, by which experts are told apart. Whoever made it may have put
# anything there, so little is read, and what isn't clearly a prompt is none.

PROMPT_FILES = ("prompts.txt", "examples.jsonl", "README.md")  # the first that is there
MOST_PROMPTS = 64
LONGEST_PROMPT = 4000  # characters
MOST_BYTES = 2**20
MOST_OF_A_CARD = 2**15  # more YAML than that could take seconds
OF_TOOLS = {"What is your favorite condiment?"}  # AutoTrain writes it into every card
FRONT = re.compile(r"(?ms)---[ \t]*\n(.*?)^---[ \t]*$")
# Headings; blocks, with their content if it is plain text; headings of prompts; code, templates and
# answers.
SECTIONS = re.compile(
    r"(?ms)^#+ ([^\n]{,200})|^(`{3,})(?!`)(?:(?:te?xt|prompt)?[ \t]*\n(.*?)|.*?\n)^\2"
)
SHOWS = re.compile(
    r"(?i)(?!.*(output|answer|format|template|system|usage)).*(prompt|input|example)"
)
NO_PROMPT = re.compile(
    r"(?im)[{}<>|$\\]|^[^\w\n]*(import|from|pip|python|output|response|answer)\b|\A\Z"
)


def prompts_beside(folder: Path) -> tuple[str, ...]:
    """The prompts in the first of PROMPT_FILES that is in an adapter's `folder`.

    A card's are the examples of its widget, else blocks of plain text under a heading that says so.
    A file that can't be read is a warning.
    """
    for name in PROMPT_FILES:
        path = folder / name
        if path.is_file():
            break
    else:
        return ()
    try:
        with reading(path, TaskError):
            prompts = _read_prompts(path)
    except TaskError as error:
        warnings.warn(f"No prompts are read beside an adapter: {error}", stacklevel=2)
        return ()
    return tuple(text[:LONGEST_PROMPT] for text in prompts[:MOST_PROMPTS])


def _read_prompts(path: Path) -> list[str]:
    size = regular_file(path, TaskError).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size} bytes, and at most {MOST_BYTES} are read")
    if path.suffix == ".md":
        return _on_card(path)
    return inputs_in(load_prompts([str(path)]))


def _on_card(path: Path) -> list[str]:
    card = path.read_text(encoding="utf-8")[:MOST_OF_A_CARD]
    front = FRONT.match(card)
    end = 0
    prompts = []
    if front:
        end = front.end()
        prompts = _of_widget(yaml.load(front[1], _WithoutAliases))
    if prompts:
        return prompts
    heading = ""
    for part in SECTIONS.finditer(card, end):
        heading = part[1] or heading
        block = (part[3] or "").strip()
        if SHOWS.match(heading) and not NO_PROMPT.search(block):
            prompts.append(block)
    return prompts


def _of_widget(front: object) -> list[str]:
    widget = front.get("widget") if isinstance(front, dict) else None
    examples = widget if isinstance(widget, list) else [widget]
    prompts: list[str] = []
    for example in examples[:MOST_PROMPTS]:
        row = example if isinstance(example, dict) else {"text": example}
        row = {"prompt": row.get("text"), "messages": row.get("messages")}
        with suppress(TaskError):
            inputs = inputs_in(load_task([row], targets=False))
            prompts += {*map(request_in, inputs)} - OF_TOOLS
    return prompts


class _WithoutAliases(yaml.SafeLoader):  # type: ignore[misc]  # untyped
    def compose_node(self, parent: object, index: object) -> object:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for gigabytes
            raise ValueError("its YAML has aliases")
        return super().compose_node(parent, index)


# From a row to an example


def _text(value: object) -> object:
    """Numbers as texts, and nothing (or NaN, of an empty cell) as an empty one."""
    if isinstance(value, list | tuple | dict):
        return value
    is_nothing = value is None or value != value
    return "" if is_nothing else str(value)


def _listed(value: object) -> object:
    """A list of texts; a CSV cell holds it separated by |||."""
    if isinstance(value, str) and value.strip():
        return _stripped(value.split(SEPARATOR))
    return () if isinstance(value, str) else value or ()


def _stripped(answers: object) -> object:
    if isinstance(answers, list | tuple):
        return list(map(_stripped, answers))
    return answers.strip() if isinstance(answers, str) else answers


# With a limit pydantic refuses half a character, which UTF-8 can't encode.
Whole = Annotated[str, StringConstraints(min_length=0)]
Text = Annotated[Whole, BeforeValidator(_text)]
Answer = Annotated[str, StringConstraints(pattern=r"\S"), BeforeValidator(_text)]
Answers = Annotated[tuple[Answer, ...], BeforeValidator(_listed)]
FIELDS = TypeAdapter(dict[str, Any])


class _Part(BaseModel):
    text: Whole


class _Turn(BaseModel):
    """One of `messages`: of several parts, all must be texts; tools can't be trained on."""

    role: str
    content: Whole | list[_Part]
    tool_calls: list[Any] | None = Field(None, max_length=0)

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _Answer(_Turn):
    """The last of `messages`, which is the target."""

    role: Literal["assistant"]


class _Row(BaseModel):
    """A row in our form. Of a chat, `messages` are the turns before the target."""

    input: Text = ""
    messages: list[_Turn] = []
    target: Text = ""
    choices: Answers = ()
    references: Answers = ()
    split: Literal["train", "validation", "test"] = "train"


def _example(row: Any, templates: Mapping[str, Template], targets: bool) -> tuple[str, Example]:
    """(split, example) of a row, which may be a line of JSON."""
    content = FIELDS.validate_python(json.loads(row) if isinstance(row, str) else row)
    fields = _rendered(content, templates) if templates else content
    read = _Row.model_validate(_in_our_form(fields, targets))
    target = read.target
    text = read.input
    if read.messages:
        text = Chat((turn.role, turn.text) for turn in read.messages)
    what = ""
    if not text.strip():
        what = "input"
    elif targets and not target.strip():
        what = "target"
    if what:
        raise ValueError(
            f"{what} is missing or empty; the fields there are "
            f"{one_line(', '.join(content)) or 'none'}. Wanted {FORMS}, or a template"
        )
    if read.choices and target:
        _check_among("target", (target,), read.choices)
    if read.choices and read.references:
        _check_among("reference", read.references, read.choices)
    return read.split, Example(text, target, read.choices, read.references)


def _check_among(what: str, answers: Sequence[str], choices: Sequence[str]) -> None:
    if set(answers).isdisjoint(choices):
        wrong = ", ".join(map(repr, answers))
        raise ValueError(f"{what} {wrong} is not among the choices {list(choices)}")


def _in_our_form(fields: Row, targets: bool) -> dict[str, Any]:
    """The fields of `_Row`, of a row in any of the forms."""
    filled = {name: value for name, value in fields.items() if value is not None}
    filled["split"] = filled.get("split") or "train"
    messages = filled.pop("messages", ())
    if isinstance(filled.get("prompt"), list):  # of turns, and so is the completion
        messages = [*filled.pop("prompt"), *filled.pop("completion", ())]
    elif not targets and "prompt" in filled:
        filled.setdefault("input", filled["prompt"])
    if "target" not in filled and "completion" in filled:
        # What follows a prompt is set off by a space of ours.
        answer = _stripped(_text(filled["completion"]))
        filled |= {"input": filled.get("prompt"), "target": answer}
    elif "target" not in filled and messages:
        *before, answer = messages
        if not targets and _Turn.model_validate(answer).role != "assistant":
            filled |= {"messages": messages, "target": ""}
        else:
            filled |= {"messages": before, "target": _Answer.model_validate(answer).text}
    elif "target" not in filled and "instruction" in filled and {"input", "output"} & {*filled}:
        parts: Any = [_stripped(_text(filled.get(name))) for name in ("instruction", "input")]
        filled |= {"input": "\n\n".join(filter(None, parts)), "target": filled.get("output")}
    return filled


def _compiled(template: str | None, choices: str | None) -> dict[str, Template]:
    """The templates of the fields that are rendered; choices come first, others may name them."""
    environment = SandboxedEnvironment(undefined=StrictUndefined, finalize=_printed)
    templates = {}
    if choices:
        templates["choices"] = environment.from_string(choices)
    if template is not None:
        text, target = map(environment.from_string, template.split(SEPARATOR))
        templates |= {"input": text, "target": target}
    return templates


def _rendered(row: Row, templates: Mapping[str, Template]) -> dict[str, Any]:
    rendered = dict(row)
    for key, template in templates.items():
        text = template.render({**row, "answer_choices": rendered.get("choices")}).strip()
        rendered[key] = _stripped(text.split(SEPARATOR)) if key == "choices" else text
    for key in ("target", "choices", "references"):
        rendered[key] = _stripped(rendered.get(key))
    return rendered


def _printed(value: object) -> object:
    return StrictUndefined(name="an empty field that it prints") if value is None else value
