"""Engines: where jobs are done, in this process one after the other or in others at once.

A comparison's cells and a pool's experts are jobs. A `Workshop` says how they are done and holds
what many of them need, such as a base; an `Engine` decides where and when, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

__all__ = ["Engine", "Job", "LocalEngine", "Work", "Workshop"]


class Job(Protocol):
    """A piece of work that may be done anywhere, and again: its result is the same then."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def group(self) -> str:
        """Jobs of one group share what is costly to prepare, so one worker should do them."""

    @property
    def size(self) -> int:
        """How many units of progress it counts for."""

    def again(self: AnyJob) -> AnyJob:
        """The job to give after its worker was lost in the middle of it."""


AnyJob = TypeVar("AnyJob", bound=Job)
AnyResult = TypeVar("AnyResult")
Work = Callable[[AnyJob], AnyResult]


class Workshop(Protocol[AnyJob, AnyResult]):
    """What jobs are done with."""

    def open(self, tell: Callable[[int], None]) -> AbstractContextManager[Work[AnyJob, AnyResult]]:
        """A function that does one job after the other while the context is open.

        It may tell how many units of a job's size were done since it last told.
        """

    def elsewhere(self) -> Workshop[AnyJob, AnyResult]:
        """The same by names and places, for another process to load what is loaded here."""


class Engine(Protocol):
    """Does jobs. A `remote` one does them in other processes, whose own bars aren't seen here."""

    remote: bool

    def run(
        self, workshop: Workshop[AnyJob, AnyResult], jobs: Sequence[AnyJob], bar: Any
    ) -> Generator[tuple[AnyJob, AnyResult], None, None]:
        """(job, result) of each of `jobs` as soon as it is done, in any order.

        `bar` (a tqdm) is moved by each job's size in all. What a job raises is raised here, and
        the others are given up.
        """


class LocalEngine:
    """Jobs in this process, in order."""

    remote = False

    def run(
        self, workshop: Workshop[AnyJob, AnyResult], jobs: Sequence[AnyJob], bar: Any
    ) -> Generator[tuple[AnyJob, AnyResult], None, None]:
        """(job, result) of each of `jobs`, in order; without any the workshop stays shut."""
        if not jobs:
            return
        with workshop.open(lambda units: None) as work:
            for job in jobs:
                bar.set_description(job.name)
                result = work(job)
                bar.update(job.size)
                yield job, result
