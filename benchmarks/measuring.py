"""Measuring times side by side in one process, in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

clock = time.perf_counter  # `run.py --processor-time` sets another


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians, and the lowest and highest ratio of one round."""

    value: float
    low: float
    high: float


def side_by_side(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, calls: int = 1, warm: int = 1
) -> dict[str, Timing]:
    """The time of one call of each contender, in turns (A B C A B C …), after `warm` rounds.

    A round's entry is the mean over `calls` calls, for actions that are too short for the clock.
    """
    clocks = {name: partial(clocked, action, calls) for name, action in contenders.items()}
    return in_turns(clocks, rounds, warm=warm)


def in_turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int, *, warm: int = 1
) -> dict[str, Timing]:
    """The seconds that each contender returns, in turns, after `warm` rounds that don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm + rounds):
        for name, contender in contenders.items():
            spent = contender()
            if turn >= warm:
                seconds[name].append(spent)
    return {name: Timing(tuple(entries)) for name, entries in seconds.items()}


def clocked(action: Callable[[], object], calls: int = 1) -> float:
    """The mean seconds of `action`, without Python's garbage collector."""
    gc.collect()
    gc.disable()
    try:
        begun = clock()
        for _ in range(calls):
            action()
        return (clock() - begun) / calls
    finally:
        gc.enable()


def ratio(one: Timing, other: Timing) -> Ratio:
    """How many times as long as `other` `one` takes."""
    by_round = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
    return Ratio(one.median / other.median, min(by_round), max(by_round))
