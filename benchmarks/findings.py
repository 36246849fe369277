"""What a benchmark finds, and the table of those that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from bench import Bench
from measuring import Ratio


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    `measured` is in `unit` ("×" for ratios), `spread` is the lowest and highest round. `note` is
    for the reader of the table; `details` are the underlying numbers.
    """

    case: str
    measured: float
    spread: tuple[float, float] | None = None
    unit: str = "×"
    note: str = ""
    details: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, case: str, found: Ratio, **others: object) -> Finding:
        """The finding that is a ratio of times."""
        return cls(case, found.value, (found.low, found.high), **others)  # type: ignore[arg-type]


Measure = Callable[[Bench], Iterator[Finding]]


@dataclass(frozen=True)
class Row:
    """A row of the table: its name on the command line, its title, how it is measured."""

    name: str
    title: str
    measure: Measure


ROWS: dict[str, Row] = {}


def row(name: str, title: str) -> Callable[[Measure], Measure]:
    """A decorator that enters a function into ROWS."""

    def enter(measure: Measure) -> Measure:
        ROWS[name] = Row(name, title, measure)
        return measure

    return enter
