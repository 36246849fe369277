"""Cells of a comparison: one row on one dataset, scored by a worker of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...base.fingerprint import number_format
from ...base.loading import Base
from ...errors import EvaluationError
from ...experts.expert import Expert
from ...jobs import BaseLocation
from ...routing.composition import composition_if_any
from ...routing.open_model import OpenedModel
from ...routing.routers.per_input.discriminant import PromptDiscriminant
from ...routing.routers.per_input.remembered_states import RememberedStates
from ...tasks.encoding import Encoder
from ..evaluate import EvaluationSet, score
from .code_version import code_version
from .rows import Row, RowLocation
from .shared_answers import SharedAnswers

__all__ = ["Cell", "CellWorkshop", "cell_of"]

Scorer = Callable[["Cell"], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """The job of one cell; `key` identifies its result in the store."""

    row: str
    dataset: str
    key: Mapping[str, Any]
    size: int = 1

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.row} on {self.dataset}"

    @property
    def group(self) -> str:
        """Cells of one row share its composed model."""
        return self.row

    def again(self) -> Cell:
        """The same cell: nothing is left of an attempt that failed."""
        return self


def cell_of(row: Row, dataset: EvaluationSet, base: Base) -> Cell:
    """The cell of `row` on `dataset`, with the key that its result is kept under."""
    key = {
        "base": base.fingerprint,
        "dtype": number_format(base.model),
        "method": dict(row.identity),
        "task": dataset.name,
        "examples": dataset.digest,
        "code": code_version(),
    }
    return Cell(row.name, dataset.name, key)


@dataclass(frozen=True)
class CellWorkshop:
    """Scores cells with a base, from rows and datasets by name."""

    base: Base
    rows: Mapping[str, Row]
    datasets: Mapping[str, EvaluationSet]
    shared: SharedAnswers = field(default_factory=SharedAnswers)

    @contextmanager
    def open(self, tell: Callable[[int], None]) -> Iterator[Scorer]:
        """A function that scores a cell and returns its result as it is stored.

        A row stays composed until a cell of another row comes, and rows that go by the same
        readings of the base share them. Closing the context restores the base.
        """
        remembered = RememberedStates()
        with ExitStack() as composed:
            at: str | None = None
            opened = OpenedModel(self.base.model, self.base.tokenizer)

            def score(cell: Cell) -> dict[str, Any]:
                nonlocal at, opened
                if cell.row != at:
                    at = None
                    composed.close()
                    opened = composed.enter_context(self.rows[cell.row].model(self.base))
                    at = cell.row
                    if opened.model is self.base.model:
                        _remember(opened, remembered)
                return _score(opened, self.datasets[cell.dataset], self.shared)

            yield score

    def portable(self) -> PortableCellWorkshop:
        """The workshop for another process, by the locations of base and experts."""
        rows = {name: row.portable() for name, row in self.rows.items()}
        base = BaseLocation.of(self.base)
        return PortableCellWorkshop(base, rows, self.datasets, code_version(), self.shared)


@dataclass(frozen=True)
class PortableCellWorkshop:
    """A `CellWorkshop` for another process, which loads base and experts itself, each once."""

    base: BaseLocation
    rows: Mapping[str, RowLocation]
    datasets: Mapping[str, EvaluationSet]
    code: str
    shared: SharedAnswers

    @contextmanager
    def open(self, tell: Callable[[int], None]) -> Iterator[Scorer]:
        """As `CellWorkshop`. Raises EvaluationError when the code here has another version."""
        if self.code != code_version():
            raise EvaluationError(
                f"A worker runs phatgoose {code_version()}, but the comparison was begun with "
                f"{self.code}; install the same version on all machines."
            )
        loaded: dict[str, Expert] = {}
        rows = {name: row.open(loaded) for name, row in self.rows.items()}
        workshop = CellWorkshop(self.base.load(), rows, self.datasets, self.shared)
        with workshop.open(tell) as score:
            yield score

    def portable(self) -> PortableCellWorkshop:
        """Itself."""
        return self


def _remember(opened: OpenedModel, remembered: RememberedStates) -> None:
    """Let the routed model `opened` use what is `remembered` of its base, and add to it."""
    parts = composition_if_any(opened.model)
    if parts is not None and isinstance(parts.lookup, PromptDiscriminant):
        parts.lookup.remembered = remembered


def _score(opened: OpenedModel, dataset: EvaluationSet, shared: SharedAnswers) -> dict[str, Any]:
    """The result of one cell, as it is stored.

    `tied` names examples with several best choices; `rows`, where several examples were made of one
    row, which they were made of.
    """
    begun = time.monotonic()
    encoder = Encoder.for_model(opened.model, opened.tokenizer, dataset.settings.formatting)
    questions = dataset.questions(encoder)
    found = shared.score(opened.model, dataset, questions)
    if found is None:
        found = score(opened.model, dataset, questions)
    rows = found.sample.rows
    return {
        **found.to_dict(),
        **({} if rows is None else {"rows": rows.tolist()}),
        "metrics": list(dataset.metrics),
        "seconds": round(time.monotonic() - begun, 2),
        "answers": [prediction.answer for prediction in found.predictions],
        "tied": [i for i, prediction in enumerate(found.predictions) if prediction.tied],
        "marks": [prediction.marks for prediction in found.predictions],
    }
