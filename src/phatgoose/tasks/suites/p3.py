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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from jinja2 import Template, pass_context
from jinja2.filters import do_truncate
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from ...errors import TaskError
from ...files import YamlLoader, reading, regular
from ..loading import SEPARATOR, TEMPLATE_FAILURES, longest_field, read_rows
from ..task import Example, Sources

FILE_NAME = "templates.yaml"
# promptsource's own substitute for a separator inside a row: some templates name it.
PROTECTED = "3ed2dface8203c4c9dfb1a5dc58e41e0"
LONGEST_VALUE = 2048  # characters of each expression, where promptsource cuts by default
DRAWS = "draws of this row"  # a name that no template can spell
HOW_TO_GET = (
    "unpack promptsource 0.2.3 and give its folder promptsource/templates, or install it: "
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
        names: set[str] = set()
        for source in (self.jinja, self.answer_choices or ""):
            names |= find_undeclared_variables(ENVIRONMENT.parse(source))
        return frozenset(names - {"answer_choices"} - ENVIRONMENT.globals.keys())

    def render(self, row: Mapping[str, Any]) -> Example | None:
        """The row's example; None if the template gives no input or no target, on purpose or not.

        The paper's code trains and scores on "<NO INPUT>" and "<NO LABEL>" instead (its p3.py,
        lines 133 to 143). The same row always gives the same text. Raises TaskError if an
        expression fails.
        """
        # A separator in a row must not split the text that it is rendered to.
        values: dict[str, Any] = {key: _protect(value) for key, value in row.items()}
        # Random, but the same for the same row; most templates never draw.
        values[DRAWS] = cache(lambda: random.Random(f"{self.name} {dict(row)!r}"))
        choices: list[str] | None = None
        try:
            if self.answer_choices is not None:
                choices = _split(_compiled(self.answer_choices).render(values))
            values["answer_choices"] = _protect(choices)
            parts = _split(_compiled(_truncating(self.jinja)).render(values))
        except TEMPLATE_FAILURES as error:
            raise TaskError(f"Template {self.name!r} can't be filled: {error}.") from error
        if len(parts) < 2 or not parts[0] or not parts[1]:
            return None
        references = tuple(part for part in parts[1:] if part) if len(parts) > 2 else ()
        passage = longest_field(
            row, parts[0], lambda value: do_truncate(ENVIRONMENT, value, LONGEST_VALUE)
        )
        return Example(parts[0], parts[1], tuple(choices or ()), references, passage)


def read_templates(folder: Path, dataset: str) -> tuple[PromptTemplate, ...]:
    """The templates of `dataset` ("NAME" or "NAME/CONFIG"), sorted by name as promptsource does.

    Raises TaskError if their file is missing or not as promptsource writes it.
    """
    file = folder / dataset / FILE_NAME
    with reading(f"Template file {file}", TaskError, f" {HOW_TO_GET}"):
        text = regular(file).read_text(encoding="utf-8")
        nodes = yaml.load(text, _Loader)["templates"].values()
        templates = [_template(node) for node in nodes]
    return tuple(sorted(templates, key=lambda template: template.name))


def templates_folder(sources: Sources) -> Path:
    """`sources.templates`, or the folder in the installed promptsource, which isn't imported."""
    if sources.templates is not None:
        if not sources.templates.is_dir():
            raise TaskError(f"Template folder {sources.templates} does not exist; {HOW_TO_GET}")
        return sources.templates
    spec = importlib.util.find_spec("promptsource")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "templates"
        if folder.is_dir():
            return folder
    raise TaskError(f"Prompt templates are missing; {HOW_TO_GET}")


@pass_context
def _choice(context: Context, items: Sequence[Any]) -> Any:
    return context[DRAWS]().choice(items)


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    counts = Counter(items)
    if not counts:
        return None
    most = max(counts.values())
    return [item for item, count in counts.items() if count == most]


ENVIRONMENT = SandboxedEnvironment()
ENVIRONMENT.globals["zip"] = zip
ENVIRONMENT.filters |= {"choice": _choice, "most_frequent": _most_frequent}


@lru_cache(maxsize=2048)
def _compiled(source: str) -> Template:
    return ENVIRONMENT.from_string(source)


@lru_cache(maxsize=2048)
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


class _Loader(YamlLoader):
    """YAML's plain types and promptsource's two tags, as dicts. Any other tag is an error."""


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    mapping: dict[str, Any] = loader.construct_mapping(node, deep=True)
    return mapping


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _mapping)


def _template(node: Mapping[str, Any]) -> PromptTemplate:
    is_original = bool((node.get("metadata") or {}).get("original_task"))
    choices = node.get("answer_choices") or None
    template = PromptTemplate(node["name"], node["jinja"], choices, is_original)
    for source in (choices or "", _truncating(template.jinja)):  # a broken one is told now
        _compiled(source)
    return template


Row = Mapping[str, Any]
Pair = tuple[Row, PromptTemplate]


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
        templates = read_templates(templates_folder(sources), self.templates)
        return without(templates, self.ignored, self)

    def rows(
        self, split: str, templates: Iterable[PromptTemplate], sources: Sources
    ) -> Sequence[Row]:
        rows = read_rows(sources, self.hub, self.config, split)
        if not len(rows):
            raise TaskError(f"Split {split} of {self.hub} has no rows.")
        names = {old: new for old, new in self.rename.items() if old in rows[0]}
        if names:
            rows = cast(Any, rows).rename_columns(names)
        fields = rows[0].keys()
        for template in templates:
            if missing := template.fields - fields:
                raise TaskError(
                    f"Split {split} of {self.hub} has no field {min(missing)}, which the template "
                    f"{template.name!r} needs; its fields are {', '.join(fields)}."
                )
        return rows


def without(
    templates: Iterable[PromptTemplate], ignored: Sequence[str], dataset: P3Dataset
) -> list[PromptTemplate]:
    """`templates` without those called `ignored`. Raises TaskError if one of these is missing."""
    by_name = {template.name: template for template in templates}
    for name in ignored:
        if by_name.pop(name, None) is None:
            raise TaskError(
                f"The templates of {dataset.templates} have no {name!r}, which {dataset.name} "
                f"leaves out; use those of promptsource 0.2.3."
            )
    return list(by_name.values())


class Picker:
    """Makes examples of one dataset's pairs of a row and a template, and counts those left out.

    These are pairs without an input or a target and, if answers are ranked, whose target is no
    choice; the paper's code takes the choice closest to the target there. If they are `generated`,
    they are compared with what a row has at `references`, a path such as "answers.text".
    """

    def __init__(
        self, name: str, references: str | None = None, *, generated: bool = False
    ) -> None:
        self._name, self._references, self._generated = name, references, generated
        self._pairs, self._left_out, self._failure = 0, Counter[str](), ""

    def training(self, pairs: Iterable[Pair]) -> tuple[Example, ...]:
        return self._some("training", (self._example(*pair) for pair in pairs))

    def graded(self, pairs: Iterable[Pair]) -> tuple[Example, ...]:
        return self._some("evaluation", (self._graded(*pair) for pair in pairs))

    def graded_in_all(
        self, rows: Iterable[Row], templates: Sequence[PromptTemplate]
    ) -> tuple[Example, ...]:
        """Examples to score, of every row in every template; `Example.row` numbers the rows."""
        numbered = (
            (number, self._graded(row, template))
            for number, row in enumerate(rows)
            for template in templates
        )
        return self._some("evaluation", (e and replace(e, row=number) for number, e in numbered))

    def warn(self) -> None:
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
            text = f"{self._name} has no {use} examples: {reasons}. {self._failure}"
            raise TaskError(text.rstrip())
        return kept

    def _example(self, row: Row, template: PromptTemplate) -> Example | None:
        self._pairs += 1
        reason = "without an input or a target"
        try:
            example = template.render(row)
        except TaskError as error:
            example, reason = None, "whose template can't be filled"
            self._failure = self._failure or str(error)
        self._left_out.update([] if example else [reason])
        return example

    def _graded(self, row: Row, template: PromptTemplate) -> Example | None:
        example = self._example(row, template)
        if example is None or (not self._generated and example.target in example.choices):
            return example
        if not self._generated:
            self._left_out["whose target is not among the answer choices"] += 1
            return None
        answers: Any = row if self._references else ()
        try:
            for name in self._references.split(".") if self._references else ():
                answers = answers[name]
        except (LookupError, TypeError) as error:
            path = self._references
            raise TaskError(f"{self._name}: a row has no field {path}, its answers.") from error
        texts = [answers] if isinstance(answers, str) else answers or ()
        references = tuple(text for text in texts if text.strip()) or example.references
        return replace(example, choices=(), references=references)
