"""Prompt templates in promptsource's notation, `input ||| target` in jinja2, that users write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from ..errors import TaskError
from ..files.quoting import shortened
from .task import Span

__all__ = ["SEPARATOR", "TEMPLATE_FAILURES", "RowTemplate", "longest_field"]

SEPARATOR = "|||"
# What an expression in a template may raise.
TEMPLATE_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class RowTemplate:
    """Renders `input`, `target` and `choices` from the fields of a row; each may be left out."""

    def __init__(self, template: str | None, choices: str | None) -> None:
        environment = SandboxedEnvironment(undefined=StrictUndefined)
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
        """The row with the rendered fields added or replaced. Raises TaskError naming `where`."""
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


def longest_field(
    row: Mapping[str, Any], text: str, shown: Callable[[str], str] = str
) -> Span | None:
    """Where `text` holds the longest of the values of `row` that occur in it exactly once.

    Values inside lists and dicts count individually. `shown` maps a value to how its template
    prints it. None where no value is found.
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
