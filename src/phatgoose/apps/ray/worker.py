"""A worker: a Ray actor that opens a workshop once and does one job after the other with it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from ...jobs import Job, Workshop
from .connection import ray

__all__ = ["Worker", "start_worker"]

PROGRESS = "progress"  # asked for while a job runs, hence in a thread of its own


class Worker:
    """What runs in the worker's process."""

    def __init__(self, workshop: list[Any], folder: str) -> None:
        self._workshop, self._units = workshop, 0
        with suppress(OSError):  # a machine that lacks the folder gets by with absolute paths
            os.chdir(folder)

    def open(self) -> str:
        """Open the workshop; answers the id of the machine, as Ray calls it."""
        # Unpacked here and not by Ray, which would take what goes wrong for a worker that was lost.
        workshop: Workshop[Any, Any] = ray.get(self._workshop[0])
        self._context = workshop.open(self._tell)
        self._work = self._context.__enter__()
        return str(ray.get_runtime_context().get_node_id())

    def do(self, job: Job) -> Any:
        """The job's result."""
        self._units = 0
        return self._work(job)

    def units(self) -> int:
        """How much of the present job is done."""
        return self._units

    def _tell(self, units: int) -> None:
        self._units += units


def start_worker(workshop: Any, *, gpus: float, cpus: float) -> Any:
    """A handle of a new worker, which starts when the cluster has room. `workshop` is a reference.

    Ray would start a worker that died anew, but not tell what it was doing: so that is left to us.
    """
    actor = ray.remote(
        num_gpus=gpus,
        num_cpus=cpus,
        max_restarts=0,
        concurrency_groups={PROGRESS: 1},
    )(Worker)
    return actor.remote([workshop], os.getcwd())
