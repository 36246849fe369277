"""What a benchmark finds, and the table of those that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from bench import Bench
from measuring import Timing, ratio


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
    def of(
        cls, case: str, timings: Mapping[str, Timing], one: str, other: str, note: str = ""
    ) -> Finding:
        """How many times as long as `other` `one` takes, with the medians of all contenders."""
        times = ratio(timings[one], timings[other])
        seconds = {name: timing.median for name, timing in timings.items()}
        return cls(
            case, times.value, (times.low, times.high), note=note, details={"seconds": seconds}
        )


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
