"""Jobs and the engines that run them: one after the other here, or several at once elsewhere.

Runs of a comparison and experts of a pool are jobs. A `Workshop` does them and holds what they
share, such as a base; an `Engine` only decides where and when.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .base import SMOLLM2, Base, BaseReference, check_base, dtype_name, load_base, recorded_id
from .experts.hub import HubReference
from .files import one_line


class Job(Protocol):
    """A piece of work with the same result wherever and however often it is done."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str:
        """Jobs of one group share costly preparation, so one worker should do them all."""

    @property
    def size(self) -> int:
        """Its share of the progress bar, in units."""

    def again(self) -> Any:
        """The job to run when a worker was lost in the middle of this one."""


class Workshop(Protocol):
    """Does jobs, with what many of them share."""

    def open(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """A function that does one job at a time."""

    def portable(self) -> Workshop:
        """The same with names and locations in place of what is loaded, for another process."""


Results = Generator[tuple[Any, Any], None, None]


class Engine(Protocol):
    """Runs jobs. A `remote` one runs them in other processes, whose progress bars aren't seen."""

    remote: bool

    def run(self, workshop: Workshop, jobs: Sequence[Job], bar: Any) -> Results:
        """(job, result) of each of `jobs` as soon as it is done, in any order.

        `bar` (a tqdm) advances by each job's size. What a job raises is raised here, and the other
        jobs are abandoned.
        """


class LocalEngine:
    """Works in this process, one job after the other."""

    remote = False

    def run(self, workshop: Workshop, jobs: Sequence[Job], bar: Any) -> Results:
        if not jobs:
            return
        with workshop.open() as work:
            for job in jobs:
                bar.set_description(one_line(job.name))
                result = work(job)
                bar.update(job.size)
                yield job, result


def absolute(place: str | Path) -> str:
    """`place` as it can be found from any working directory; ids and references stay unchanged."""
    is_name = HubReference.is_one(place) or str(place) == SMOLLM2
    return str(place) if is_name or not Path(place).exists() else str(Path(place).resolve())


@dataclass(frozen=True)
class BaseLocation:
    """Where a base can be loaded from, in which dtype, and which base it has to be."""

    place: str
    dtype: str
    reference: BaseReference

    @classmethod
    def of(cls, base: Base) -> BaseLocation:
        dtype = dtype_name(base.model.dtype)
        return cls(recorded_id(base.id), dtype, base.reference)

    def load(self) -> Base:
        """The base, under the id it had. Raises WrongBaseError when other weights are there now."""
        base = load_base(self.place, dtype=self.dtype, revision=self.reference.revision)
        if self.reference.fingerprint is not None:
            check_base(self.reference, base.reference, "this worker's jobs")
        return replace(base, id=self.reference.id)
