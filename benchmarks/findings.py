"""What a benchmark finds, and the table of those that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from bench import Bench
from measuring import Ratio

__all__ = ["ROWS", "Finding", "Row", "Target", "at_least", "at_most", "row"]


@dataclass(frozen=True)
class Target:
    """What is wanted: at most or at least `value`."""

    value: float
    most: bool

    def met_by(self, measured: float) -> bool:
        """Whether `measured` is good enough."""
        return measured <= self.value if self.most else measured >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.value:g}"


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    `measured` is in `unit` ("×" for ratios). `floor` is the arithmetic floor in the same unit: the
    value if only multiply-adds took time (`floors`); None where there are none. `target` is None
    for a mere comparison. `spread` is the lowest and highest round. `note` is for the reader of the
    table; `details` are the underlying numbers.
    """

    case: str
    measured: float
    target: Target | None = None
    floor: float | None = None
    spread: tuple[float, float] | None = None
    unit: str = "×"
    note: str = ""
    details: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, case: str, found: Ratio, **others: object) -> Finding:
        """The finding that is a ratio of times."""
        return cls(case, found.value, spread=(found.low, found.high), **others)  # type: ignore[arg-type]


Measure = Callable[[Bench], Iterator[Finding]]


@dataclass(frozen=True)
class Row:
    """A row of the issue's table: its name on the command line, its title, how it is measured."""

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


def at_most(value: float) -> Target:
    """The target of something that should be small."""
    return Target(value, most=True)


def at_least(value: float) -> Target:
    """The target of something that should be large."""
    return Target(value, most=False)
