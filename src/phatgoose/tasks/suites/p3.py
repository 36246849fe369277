"""Examples from the rows of a dataset and P3's prompt templates.

P3 is Sanh et al. 2022, "Multitask Prompted Training Enables Zero-Shot Task Generalization".
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import TaskError
from ..task import Example
from .entries import Sources
from .hub import read_rows
from .promptsource import PromptTemplate, read_templates, templates_folder

__all__ = ["P3Dataset", "Picker", "Row", "without"]

Row = Mapping[str, Any]


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
        """Where the data come from, in words."""
        return f"{self.hub}, prompts of P3"

    @property
    def templates(self) -> str:
        """The folder of its templates in promptsource: DATASET or DATASET/CONFIG."""
        return "/".join(filter(None, (self.hub.split("/")[-1], self.config)))

    def prompt_templates(self, sources: Sources) -> list[PromptTemplate]:
        """The templates without the ignored ones, sorted by name."""
        if self.prompt:
            choices = "|||".join(self.prompt_choices)
            return [PromptTemplate(self.name, self.prompt, choices, original_task=True)]
        templates = read_templates(templates_folder(sources), self.templates)
        return without(templates, self.ignored, self)

    def rows(
        self, split: str, templates: Iterable[PromptTemplate], sources: Sources
    ) -> Sequence[Row]:
        """The split's rows. Raises TaskError without a field that the templates mention."""
        rows = read_rows(sources, self.hub, self.config, split)
        if not len(rows):
            raise TaskError(f"Split {split} of {self.hub} has no rows.")
        if self.rename:
            rows = _Renamed(rows, self.rename)
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
    """The templates without those that `ignored` names. Raises TaskError for an unknown name."""
    templates = list(templates)
    missing = [name for name in ignored if name not in {each.name for each in templates}]
    if missing:
        raise TaskError(
            f"The templates of {dataset.templates} have no {missing[0]!r}, which {dataset.name} "
            f"leaves out; use those of promptsource 0.2.3."
        )
    return [template for template in templates if template.name not in ignored]


class _Renamed(Sequence[Row]):
    """Rows with other names for some of their fields."""

    def __init__(self, rows: Sequence[Row], names: Mapping[str, str]) -> None:
        self._rows, self._names = rows, names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return {self._names.get(name, name): value for name, value in self._rows[index].items()}


class Picker:
    """Makes examples of one dataset's pairs of a row and a template, and counts those left out.

    It leaves out pairs for which the template fails or renders no input or no target and, where
    answers are ranked, pairs whose target is not among the choices. The paper's code uses
    "<NO INPUT>" and "<NO LABEL>" instead, and the choice closest to the target.
    """

    def __init__(
        self, name: str, references: str | None = None, *, generated: bool = False
    ) -> None:
        self._name, self._references, self._generated = name, references, generated
        self._pairs = 0
        self._left_out: Counter[str] = Counter()
        self._failure = ""

    def training(self, pairs: Iterable[tuple[Row, PromptTemplate]]) -> tuple[Example, ...]:
        """Examples to train on; their choices are those that the prompt offers, if any."""
        examples = (self._example(row, template) for row, template in pairs)
        return self._some("training", examples)

    def graded(self, pairs: Iterable[tuple[Row, PromptTemplate]]) -> tuple[Example, ...]:
        """Examples to score: with choices to rank, or without where text is generated."""
        return self._some("evaluation", (self._graded(row, template) for row, template in pairs))

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
        """Warn once about the pairs that were left out."""
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
            example = template.render(row)
        except TaskError as error:
            self._failure = self._failure or str(error)
            self._left_out["whose template can't be filled"] += 1
            return None
        if example is None:
            self._left_out["without an input or a target"] += 1
        return example

    def _graded(self, row: Row, template: PromptTemplate) -> Example | None:
        return (self._open_ended if self._generated else self._ranked)(row, template)

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
