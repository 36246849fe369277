"""P3: promptsource's templates, read and rendered without the package, and examples of them.

P3 is Sanh et al. 2022, "Multitask Prompted Training Enables Zero-Shot Task Generalization".

A template is a jinja2 text, `input ||| target`, filled from a row of its dataset. It renders what
`Template.apply` of promptsource 0.2.3 gives, which the paper's code calls, including the truncation
of long fields (Bach et al. 2022, "PromptSource"). We differ in three points: a `|||` in a row never
splits, not even in a list, a dict or an answer choice; the filter `choice` draws the same element
for the same row; and jinja2 runs in its sandbox.
"""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial, reduce
from operator import getitem
from pathlib import Path
from statistics import multimode
from typing import Any, NamedTuple, cast

import yaml  # type: ignore[import-untyped]
from jinja2 import Template, pass_context
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from ...errors import TaskError
from ...files import first_line, reading, regular
from ..loading import SEPARATOR, TEMPLATE_FAILURES, Row, read_rows
from ..task import Example, Sources

FILE_NAME = "templates.yaml"
# promptsource's own substitute for a separator inside a row: some templates name it.
PROTECTED = "3ed2dface8203c4c9dfb1a5dc58e41e0"
LONGEST_VALUE = 2048  # characters of each expression, where promptsource cuts by default
DRAWS = "draws of this row"  # a name that no template can spell
HOW_TO_GET = (
    " Unpack promptsource 0.2.3 and give its folder promptsource/templates, or install it: "
    "pip install --no-deps --ignore-requires-python promptsource==0.2.3"
)


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt template of promptsource.

    `jinja` renders to `input ||| target` with one or more targets, `answer_choices` to `choice |||
    choice...` (None: open-ended). `original_task`: it poses the dataset's own task.
    """

    name: str
    jinja: str
    answer_choices: str | None = None
    original_task: bool = False

    @cached_property
    def fields(self) -> frozenset[str]:
        names = set[str]()
        for source in (self.jinja, self.answer_choices or ""):
            names |= find_undeclared_variables(ENVIRONMENT.parse(source))
        return frozenset(names - {"answer_choices"} - ENVIRONMENT.globals.keys())

    def render(self, row: Row) -> Example | None:
        """The row's example; None if the template gives no input or no target, on purpose or not.

        The paper's code trains and scores on "<NO INPUT>" and "<NO LABEL>" instead (its p3.py,
        lines 133 to 143). The same row always gives the same text. Raises one of TEMPLATE_FAILURES
        if an expression fails.
        """
        # A separator in a row must not split the text that it is rendered to.
        values: dict[str, Any] = {key: _protect(value) for key, value in row.items()}
        # Random, but the same for the same row; most templates never draw.
        values[DRAWS] = cache(lambda: random.Random(f"{self.name} {dict(row)!r}"))
        choices: list[str] | None = None
        if self.answer_choices is not None:
            choices = _split(_compiled(self.answer_choices).render(values))
        values["answer_choices"] = _protect(choices)
        parts = _split(_compiled(_truncating(self.jinja)).render(values))
        if len(parts) < 2 or not parts[0] or not parts[1]:
            return None
        references = tuple(filter(None, parts[1:])) if len(parts) > 2 else ()
        return Example(parts[0], parts[1], tuple(choices or ()), references)


def read_templates(folder: Path, dataset: str) -> tuple[PromptTemplate, ...]:
    """The templates of `dataset` ("NAME" or "NAME/CONFIG"), sorted by name as promptsource does.

    Raises TaskError if their file is missing or not as promptsource writes it.
    """
    file = folder / dataset / FILE_NAME
    with reading(f"Template file {file}", TaskError, HOW_TO_GET):
        text = regular(file).read_text(encoding="utf-8")
        nodes = yaml.load(text, _Loader)["templates"].values()
        templates = [_template(node) for node in nodes]
    return tuple(sorted(templates, key=lambda template: template.name))


@pass_context
def _choice(context: Context, items: Sequence[Any]) -> Any:
    return context[DRAWS]().choice(items)


ENVIRONMENT = SandboxedEnvironment()
ENVIRONMENT.globals["zip"] = zip
ENVIRONMENT.filters |= {"choice": _choice, "most_frequent": lambda items: multimode(items) or None}


@lru_cache(maxsize=2048)
def _compiled(source: str) -> Template:
    return ENVIRONMENT.from_string(source)


def _truncating(jinja: str) -> str:
    """The template with each expression truncated, exactly as promptsource writes it."""
    return jinja.replace("}}", f" | string | truncate({LONGEST_VALUE}) }}}}")


def _split(text: str) -> list[str]:
    return [part.replace(PROTECTED, SEPARATOR).strip() for part in text.split(SEPARATOR)]


def _protect(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(SEPARATOR, PROTECTED)
    if isinstance(value, Mapping):
        return {key: _protect(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_protect(item) for item in value]
    return value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # untyped
    """YAML's plain types and promptsource's two tags, as dicts. Any other tag is an error.

    libyaml's is ten times faster.
    """


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, partial(_Loader.construct_mapping, deep=True))


def _template(node: Row) -> PromptTemplate:
    is_original = bool((node.get("metadata") or {}).get("original_task"))
    choices = node.get("answer_choices") or None
    template = PromptTemplate(node["name"], node["jinja"], choices, is_original)
    for source in (choices or "", _truncating(template.jinja)):  # a broken one is told now
        _compiled(source)
    return template


class Pair(NamedTuple):
    """What an example is made of; `number` is the row's, if several are made of it."""

    row: Row
    template: PromptTemplate
    number: int | None = None


@dataclass(frozen=True)
class P3Dataset:
    """A dataset with P3's prompts.

    `prompt` (in promptsource's notation) and `prompt_choices`, where given, replace promptsource's
    templates. `ignored` names templates that are never used. `rename` maps field names in some
    copies of the dataset to those in the templates.
    """

    name: str
    hub: str
    config: str | None = None
    ignored: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    prompt_choices: tuple[str, ...] = ()
    validation: str = "validation"

    @property
    def source(self) -> str:
        return f"{self.hub}, prompts of P3"

    @property
    def templates(self) -> str:
        return "/".join(filter(None, (self.hub.split("/")[-1], self.config)))

    def prompt_templates(self, sources: Sources) -> list[PromptTemplate]:
        if self.prompt:
            choices = "|||".join(self.prompt_choices)
            return [PromptTemplate(self.name, self.prompt, choices, original_task=True)]
        spec = importlib.util.find_spec("promptsource")  # found, but not imported
        package = Path(spec.origin).parent if spec and spec.origin else Path("promptsource")
        folder = sources.templates or package / "templates"
        templates = read_templates(folder, self.templates)
        return [each for each in templates if each.name not in self.ignored]

    def rows(
        self, split: str, templates: Iterable[PromptTemplate], sources: Sources
    ) -> Sequence[Row]:
        rows = read_rows(sources, self.hub, self.config, split)
        names = {old: new for old, new in self.rename.items() if old in rows[0]}
        if names:
            rows = cast(Any, rows).rename_columns(names)
        fields = rows[0].keys()
        for template in templates:
            missing = template.fields - fields
            if missing:
                raise TaskError(
                    f"Split {split} of {self.hub} has no field {min(missing)}, which the template "
                    f"{template.name!r} needs; its fields are {', '.join(fields)}."
                )
        return rows


Grade = Callable[[Row, Example], Example | None]


def ranked(_: Row, example: Example) -> Example | None:
    """The example, if its target is a choice; the paper's code takes the closest one instead."""
    return example if example.target in example.choices else None


def generated(references: str | None, row: Row, example: Example) -> Example:
    """Its answer is compared with what the row has at `references`, such as "answers.text"."""
    answers: Any = ()
    if references:
        answers = reduce(getitem, references.split("."), row)
    texts = [answers] if isinstance(answers, str) else answers or ()
    right = tuple(filter(str.strip, texts)) or example.references
    return replace(example, choices=(), references=right)


def picked(
    what: str, pairs: Iterable[Pair], grade: Grade = lambda _, example: example
) -> tuple[Example, ...]:
    """The examples of all pairs, graded. A warning counts those that can't be used.

    These have no input or no target, no target among the choices, or no template that can be
    filled. Raises TaskError if none is left.
    """
    examples = []
    lost = 0
    failure = ""
    for row, template, number in pairs:
        try:
            example = template.render(row)
            example = example and grade(row, example)
        except TEMPLATE_FAILURES as error:
            example = None
            failure = failure or f" First failure: template {template.name!r}, {first_line(error)}."
        if example is None:
            lost += 1
        else:
            examples.append(replace(example, row=number))
    message = (
        f"{what}: {lost} of {lost + len(examples)} pairs of a row and a prompt template are left "
        f"out, without an input or a target, or a target among the choices.{failure}"
    )
    if not examples:
        raise TaskError(message)
    if lost:
        warnings.warn(message, stacklevel=3)
    return tuple(examples)
