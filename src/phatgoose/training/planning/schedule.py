"""A training plan spread over workers: how long it takes, and what the machines need."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from ...errors import ConfigError
from .plan import Plan

__all__ = ["Schedule", "schedule"]


@dataclass(frozen=True)
class Schedule:
    """How `workers` workers train a plan's experts, each free worker taking the next one.

    `seconds` is the time until the last expert is finished, `share` the part of the workers' time
    spent training. `memory_bytes` is one worker's, `gpus` all workers' together. `working_bytes` is
    the size of the unfinished work of all experts in training, `disk_bytes` of the finished ones.
    """

    workers: int
    gpus: float
    seconds: float
    share: float
    memory_bytes: int
    working_bytes: int
    disk_bytes: int


def schedule(plan: Plan, workers: int, gpus_per_worker: float = 0.0) -> Schedule:
    """The schedule of `plan` on so many workers, which take experts in the plan's order.

    Raises ConfigError for fewer than one worker or a negative number of GPUs.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers!r}, but must be at least 1.")
    if not 0 <= gpus_per_worker < math.inf:
        raise ConfigError(f"gpus_per_worker is {gpus_per_worker!r}, but must be 0 or more.")
    needed = min(workers, len(plan.tasks))
    free = [plan.start_seconds] * needed
    for task in plan.tasks:
        heapq.heapreplace(free, free[0] + task.seconds)
    seconds = max(free, default=0.0)
    return Schedule(
        workers=workers,
        gpus=workers * gpus_per_worker,
        seconds=seconds,
        share=plan.seconds / (seconds * workers) if seconds else 0.0,
        memory_bytes=plan.memory_bytes,
        working_bytes=needed * plan.working_bytes,
        disk_bytes=plan.disk_bytes,
    )
