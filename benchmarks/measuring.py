"""Measuring times side by side in one process, in turns, and memory in a fresh process."""

from __future__ import annotations

import ctypes
import gc
import mmap
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Memory",
    "Ratio",
    "Timing",
    "clocked",
    "in_turns",
    "peak_memory",
    "ratio",
    "side_by_side",
]

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SAMPLING = 0.002  # seconds between two looks at the memory in use
HERE, MAIN = Path(__file__).resolve().parent, "run"  # which imports every subject


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


@dataclass(frozen=True)
class Memory:
    """The most bytes that an action added to its process.

    `peak` is resident memory (VmHWM), including pages of mapped files, which the system may drop at
    will; `own` excludes those and is sampled every two milliseconds.
    """

    peak: int
    own: int


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
        begun = time.perf_counter()
        for _ in range(calls):
            action()
        return (time.perf_counter() - begun) / calls
    finally:
        gc.enable()


def ratio(one: Timing, other: Timing) -> Ratio:
    """How many times as long as `other` `one` takes."""
    by_round = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
    return Ratio(one.median / other.median, min(by_round), max(by_round))


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> Memory:
    """The memory of the action that `prepare(*arguments)` returns, in a fresh process.

    `prepare` is a function of a module; memory that it takes itself is not counted. Raises
    BrokenProcessPool when the process is killed, as when memory runs out.
    """
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, _forkserver(), torch.set_num_threads, (threads,)) as process:
        return process.submit(_measure, prepare, arguments).result()


@cache
def _forkserver() -> ForkServerContext:
    """A context whose processes are copies of one that has imported everything and run nothing.

    They get sys.path from the environment: before Python 3.13 there is no other way.
    """
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([MAIN])
    return context


def _measure(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> Memory:
    action = prepare(*arguments)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # freed memory would hide new one
    if trim is not None:
        trim(0)
    RESET.write_text("5")  # resets the highest value
    before, own_before = _status("VmRSS"), _status("RssAnon")
    highest, done = [own_before], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLING):
            highest[0] = max(highest[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = action()
    done.set()
    watcher.join()
    own = max(highest[0], _status("RssAnon"))
    # At least a page: what a smoke run takes may have been free already, and ratios divide by it.
    added = (_status("VmHWM") - before, own - own_before)
    memory = Memory(*(max(each, mmap.PAGESIZE) for each in added))
    del kept
    return memory


def _status(field: str) -> int:
    """A field of the kernel's status of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])
