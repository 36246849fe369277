"""Cells of a comparison: one model on one dataset, scored where an engine has a worker."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...base.fingerprint import number_format
from ...base.loading import Base
from ...config import Formatting
from ...errors import EvaluationError
from ...experts.expert import Expert
from ...jobs import BasePlace
from ...routing.open_model import OpenedModel
from ...tasks.encoding import Encoder
from ...tasks.task import Task
from ..answers import Questions
from ..evaluate import TaskScore, metrics_of, questions_of, score
from .code_version import code_version
from .methods import Row, RowPlace

__all__ = ["Cell", "CellWorkshop", "Dataset", "Protocol", "cell_of"]

Scorer = Callable[["Cell"], dict[str, Any]]


@dataclass(frozen=True)
class Protocol:
    """How every cell is scored."""

    formatting: Formatting
    max_new_tokens: int
    token_budget: int


@dataclass(frozen=True)
class Dataset:
    """A task cut down to the examples that are scored, and the digest of all that matters of it."""

    task: Task
    metrics: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, task: Task, limit: int | None, seed: int, protocol: Protocol) -> Dataset:
        """The dataset of at most `limit` examples of `task`, drawn by `seed`."""
        examples = task.evaluation_examples(limit, seed)
        metrics = metrics_of(task, examples)
        longest = task.max_new_tokens or protocol.max_new_tokens
        content = [
            [asdict(example) for example in examples],
            metrics,
            None if metrics == ("accuracy",) else longest,
            asdict(protocol.formatting),
            protocol.token_budget,
        ]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        chosen = replace(task, train=(), validation=(), test=examples, max_new_tokens=longest)
        return cls(chosen, metrics, digest)

    @property
    def max_new_tokens(self) -> int:
        """The tokens of a generated answer at most."""
        return self.task.max_new_tokens or 0  # `of` has set it

    def questions(self, encoder: Encoder) -> Questions:
        """Its examples as a model is asked them."""
        return questions_of(self.task, self.task.test, encoder, self.max_new_tokens)


@dataclass(frozen=True)
class Cell:
    """The job of one cell; `key` identifies its result in the store."""

    row: str
    dataset: str
    key: Mapping[str, Any]
    size: int = 1

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.row} on {self.dataset}"

    @property
    def group(self) -> str:
        """Cells of one row share its composed model."""
        return self.row

    def again(self) -> Cell:
        """The same cell: what was lost of it left nothing behind."""
        return self


def cell_of(row: Row, dataset: Dataset, base: Base) -> Cell:
    """The cell of `row` on `dataset`, with the key that its result is kept under."""
    key = {
        "base": base.fingerprint,
        "dtype": number_format(base.model),
        "method": dict(row.identity),
        "task": dataset.task.name,
        "examples": dataset.digest,
        "code": code_version(),
    }
    return Cell(row.name, dataset.task.name, key)


@dataclass(frozen=True)
class CellWorkshop:
    """What cells are scored with: a base, and rows and datasets by name."""

    base: Base
    rows: Mapping[str, Row]
    datasets: Mapping[str, Dataset]
    protocol: Protocol

    @contextmanager
    def open(self, tell: Callable[[int], None]) -> Iterator[Scorer]:
        """A function that scores cells; a row stays composed until a cell of another one comes.

        It gives a cell's result as it is stored. The base is as it was when the context closes.
        """
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
                return _score(opened, self.datasets[cell.dataset], self.protocol)

            yield score

    def elsewhere(self) -> CellWorkshopElsewhere:
        """The same by the places of base and experts."""
        rows = {name: row.elsewhere() for name, row in self.rows.items()}
        return CellWorkshopElsewhere(
            BasePlace.of(self.base), rows, self.datasets, self.protocol, code_version()
        )


@dataclass(frozen=True)
class CellWorkshopElsewhere:
    """A `CellWorkshop` for another process, which loads base and experts itself, each once."""

    base: BasePlace
    rows: Mapping[str, RowPlace]
    datasets: Mapping[str, Dataset]
    protocol: Protocol
    code: str

    @contextmanager
    def open(self, tell: Callable[[int], None]) -> Iterator[Scorer]:
        """As `CellWorkshop.open`. Raises EvaluationError when the code here is another one."""
        if self.code != code_version():
            raise EvaluationError(
                f"A worker runs phatgoose {code_version()}, but the comparison was begun with "
                f"{self.code}; install the same version on all machines."
            )
        loaded: dict[str, Expert] = {}
        rows = {name: place.open(loaded) for name, place in self.rows.items()}
        workshop = CellWorkshop(self.base.load(), rows, self.datasets, self.protocol)
        with workshop.open(tell) as score:
            yield score

    def elsewhere(self) -> CellWorkshopElsewhere:
        """Itself."""
        return self


def _score(opened: OpenedModel, dataset: Dataset, protocol: Protocol) -> dict[str, Any]:
    """One cell, as it is stored."""
    begun, task = time.monotonic(), dataset.task
    encoder = Encoder.for_model(opened.model, opened.tokenizer, protocol.formatting)
    found = score(
        opened.model,
        task,
        task.test,
        dataset.questions(encoder),
        encoder,
        dataset.max_new_tokens,
        protocol.token_budget,
    )
    return {
        **_without_predictions(found),
        "metrics": list(dataset.metrics),
        "seconds": round(time.monotonic() - begun, 2),
        "answers": [prediction.answer for prediction in found.predictions],
        "marks": [prediction.marks for prediction in found.predictions],
    }


def _without_predictions(score: TaskScore) -> dict[str, Any]:
    record = asdict(score)
    del record["predictions"]
    return record
