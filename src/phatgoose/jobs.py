"""Jobs, and who does them: engines, in this process one after the other or in others at once.

A comparison's cells and a pool's experts are jobs. A `Workshop` says how they are done and holds
what many of them need, such as a base; an `Engine` decides where and when, and nothing else. Bases
travel by name and place, so that another process can load the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .base.fingerprint import BaseReference, check_base
from .base.loading import Base, load_base
from .base.smollm2 import SMOLLM2
from .experts.hub import HubReference

__all__ = ["BasePlace", "Engine", "Job", "LocalEngine", "Work", "Workshop", "absolute"]


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


def absolute(place: str | Path) -> str:
    """`place` as it is found from any working directory: ids and references stay as they are."""
    is_name = HubReference.is_one(place) or str(place) == SMOLLM2
    return str(place) if is_name or not Path(place).exists() else str(Path(place).resolve())


@dataclass(frozen=True)
class BasePlace:
    """Where a base is found, in which dtype, and how it is recognised and recorded."""

    place: str
    dtype: str
    reference: BaseReference

    @classmethod
    def of(cls, base: Base) -> BasePlace:
        """The place of a base that is loaded here."""
        dtype = str(base.model.dtype).removeprefix("torch.")
        return cls(absolute(base.id), dtype, base.reference)

    def load(self) -> Base:
        """The base, under the id it had. Raises WrongBaseError when other weights are there now."""
        base = load_base(self.place, dtype=self.dtype, revision=self.reference.revision)
        check_base(self.reference, base.reference, "this worker's jobs")
        return replace(base, id=self.reference.id)
