"""A Ray actor that opens a workshop once and does one job after another with it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from ...jobs import Job, Workshop
from ..processor import keep_to
from .connection import ray

__all__ = ["Worker", "start_worker"]

PROGRESS = "progress"  # the thread that answers `units` while a job runs


class Worker:
    """The actor; torch has as many threads in it as it has `cpus`."""

    def __init__(self, workshop: list[Any], folder: str, cpus: float) -> None:
        self._workshop, self._units, self._cpus = workshop, 0, cpus
        with suppress(OSError):  # a machine without the folder needs absolute paths
            os.chdir(folder)

    def open(self) -> str:
        """Open the workshop; returns Ray's id of the machine."""
        keep_to(self._cpus)
        # Fetched here: when Ray fetches it, it takes any error for a lost worker.
        workshop: Workshop[Any, Any] = ray.get(self._workshop[0])
        self._context = workshop.open(self._tell)
        self._work = self._context.__enter__()
        return str(ray.get_runtime_context().get_node_id())

    def do(self, job: Job) -> Any:
        """The job's result."""
        self._units = 0
        return self._work(job)

    def units(self) -> int:
        """How many units of the current job are done."""
        return self._units

    def _tell(self, units: int) -> None:
        self._units += units


def start_worker(workshop: Any, *, gpus: float, cpus: float) -> Any:
    """A handle to a new worker, which starts when the cluster has room. `workshop` is a reference.

    Ray could restart a lost worker, but wouldn't say which job it had; so the engine replaces it.
    """
    actor = ray.remote(
        num_gpus=gpus,
        num_cpus=cpus,
        max_restarts=0,
        concurrency_groups={PROGRESS: 1},
    )(Worker)
    return actor.remote([workshop], os.getcwd(), cpus)
