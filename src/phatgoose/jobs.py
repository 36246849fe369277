"""Jobs and the engine that runs them one after the other; `apps.ray_engine` has another.

Runs of a comparison and experts of a pool are jobs: each is a piece of work with the same result
wherever and however often it is done. It has a `name`, a `size` (its share of the progress bar, in
units) and `again()`, the job to run when a worker was lost in the middle of it. A workshop holds
what jobs share, such as a base. `open()` is a context with a function that does one job; and
`portable()` the same workshop with names and locations in place of what is loaded, for another
process.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from .base.identity import Base, BaseReference, check_base, dtype_name, recorded_id
from .base.loading import load_base
from .experts.hub import HubReference
from .files import one_line
from .names import SMOLLM2

Results = Generator[tuple[Any, Any], None, None]


class Engine:
    """Runs jobs in this process, one after the other.

    A `remote` one runs them in other processes, whose progress bars aren't seen.
    """

    remote: ClassVar[bool] = False

    def run(self, workshop: Any, jobs: Sequence[Any], bar: Any) -> Results:
        """(job, result) of each of `jobs` as soon as it is done, in any order.

        `bar` (a tqdm) advances by each job's size. What a job raises is raised here, and the other
        jobs are abandoned.
        """
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
        return cls(recorded_id(base.id), dtype_name(base.model.dtype), base.reference)

    def load(self) -> Base:
        """The base, under the id it had. Raises WrongBaseError when other weights are there now."""
        base = load_base(self.place, dtype=self.dtype, revision=self.reference.revision)
        if self.reference.fingerprint is not None:
            check_base(self.reference, base.reference, "this worker's jobs")
        return replace(base, id=self.reference.id)
