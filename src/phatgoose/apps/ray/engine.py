"""The engine on Ray: workers that are hired, given jobs, and replaced when they are lost.

A job whose worker is lost (its process was killed, its machine went away) is given to another,
`again`. Nothing but the job's own folder is needed for that. This process alone knows what is done;
if it dies its workers end, and what they have finished is found by whoever gives the jobs anew.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import EngineError, PhatgooseError
from ...jobs import AnyJob, AnyResult, Workshop
from .connection import ray
from .worker import PROGRESS, start_worker

__all__ = ["RayEngine", "job_for"]

logger = logging.getLogger(__name__)

MOMENT = 0.5  # seconds between two looks at how far jobs are
MOST_LOSSES = 3  # of workers at one job, on machines that stayed, without its getting any further
STARTING = "a worker that was starting"
WAITING = 30.0  # seconds without any worker after which it is worth a line


@dataclass
class RayEngine:
    """Jobs on the cluster that this process is connected with (see `connected`).

    `workers` None: as many as fit. `gpus_per_worker` may be a fraction; None means one where the
    cluster has any. `cpus_per_worker` (None: 1) is also the number of a worker's threads.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float | None = None
    remote: bool = field(default=True, init=False)

    def run(
        self, workshop: Workshop[AnyJob, AnyResult], jobs: Sequence[AnyJob], bar: Any
    ) -> Generator[tuple[AnyJob, AnyResult], None, None]:
        """(job, result) of each of `jobs` as soon as it is done, in any order.

        Raises what a job raises, and EngineError when no machine has room for a worker or jobs lose
        one worker after the other.
        """
        if not jobs:
            return
        crew = _Crew(self, ray.put(workshop.portable()), list(jobs), bar)
        try:
            while crew.unfinished:
                yield from crew.turn()
        finally:
            crew.dismiss()

    def needs(self) -> dict[str, float]:
        """What one worker takes of a machine, as Ray counts it."""
        gpus = self.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if any("GPU" in node["Resources"] for node in _machines()) else 0.0
        cpus = 1.0 if self.cpus_per_worker is None else self.cpus_per_worker
        return {"CPU": cpus, "GPU": gpus}

    def room(self) -> int:
        """How many workers there are to be. Raises EngineError when no machine is large enough."""
        needs = self.needs()
        fit = _fitting(needs)
        if not fit:
            wanted = " and ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            raise EngineError(f"No machine of the cluster has {wanted}, which a worker needs.")
        return fit if self.workers is None else self.workers


def job_for(group: str | None, taken: Iterable[str | None], left: Sequence[Any]) -> Any:
    """The job of `left`, which has some, for a worker at `group` while others are at `taken`.

    The first of its own group, else of the group with the most jobs that aren't another's next.
    """
    sizes = Counter(job.group for job in left)
    for other in taken:
        if other in sizes:
            sizes[other] -= 1  # its worker will take the next one
    chosen = group if group in sizes else max(sizes, key=lambda name: sizes[name])
    return next(job for job in left if job.group == chosen)


def _fitting(needs: Mapping[str, float]) -> int:
    """How many workers that need so much have room on the machines that are there now."""
    wanted = {name: amount for name, amount in needs.items() if amount}
    return sum(
        min(
            (math.floor(m["Resources"].get(name, 0) / n + 1e-9) for name, n in wanted.items()),
            default=1,
        )
        for m in _machines()
    )


def _machines() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


@dataclass(eq=False)
class _Hand:
    """One worker as seen from here: its actor, what it was asked last, and where it is."""

    actor: Any
    asked: Any  # reference of the answer that is waited for, None while it has nothing to do
    job: Any = None
    machine: str | None = None  # None until its workshop is open
    group: str | None = None
    shown: int = 0  # units of its job that the bar has
    progress: Any = None


class _Crew:
    """The workers of one run and the jobs that are left."""

    def __init__(self, engine: RayEngine, workshop: Any, jobs: list[Any], bar: Any) -> None:
        self._engine, self._workshop, self._bar = engine, workshop, bar
        self._left, self._count = jobs, len(jobs)
        self._hands: list[_Hand] = []
        self._losses: Counter[str] = Counter()
        self._furthest: Counter[str] = Counter()  # units of a job that were done when it was lost
        self._needs = engine.needs()
        engine.room()  # that there are machines for it at all is told at once
        self._seen = time.monotonic()

    @property
    def unfinished(self) -> bool:
        """True while a job is left or at work."""
        return bool(self._left) or any(hand.job is not None for hand in self._hands)

    def turn(self) -> Generator[tuple[Any, Any], None, None]:
        """Hire, give jobs, wait a moment; the results that have come."""
        self._hire()
        self._give()
        waiting = {hand.asked: hand for hand in self._hands if hand.asked is not None}
        if not waiting:  # all machines are gone; others may come
            time.sleep(MOMENT)
        for reference in _answers(list(waiting)):
            yield from self._answered(waiting[reference])
        self._look()

    def dismiss(self) -> None:
        """End all workers, whatever they are doing."""
        for hand in self._hands:
            ray.kill(hand.actor)

    def _hire(self) -> None:
        """New workers while there are jobs for them and room."""
        busy = sum(hand.job is not None for hand in self._hands)
        room = self._engine.workers or _fitting(self._needs)  # machines come and go
        wanted = min(room, busy + len(self._left))
        while len(self._hands) < wanted:
            actor = start_worker(self._workshop, cpus=self._needs["CPU"], gpus=self._needs["GPU"])
            self._hands.append(_Hand(actor, actor.open.remote()))

    def _give(self) -> None:
        """A job to each worker that has none, of the group it is at or else of the fullest."""
        for hand in self._hands:
            if hand.asked is not None or not self._left:
                continue
            taken = [other.group for other in self._hands if other.job is not None]
            hand.job = job_for(hand.group, taken, self._left)
            self._left.remove(hand.job)
            hand.group, hand.shown, hand.progress = hand.job.group, 0, None
            hand.asked = hand.actor.do.remote(hand.job)

    def _answered(self, hand: _Hand) -> Generator[tuple[Any, Any], None, None]:
        """What `hand` was asked for has come, or will never come."""
        try:
            answer = ray.get(hand.asked)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            self._lose(hand, error)
            return
        hand.asked = None
        if hand.machine is None:
            hand.machine, self._seen = answer, time.monotonic()
            self._losses[STARTING] = 0
            return
        job, hand.job = hand.job, None
        self._bar.update(job.size - hand.shown)
        yield job, answer

    def _lose(self, hand: _Hand, error: Exception) -> None:
        """Give up a worker; its job goes back to the others."""
        ray.kill(hand.actor)
        self._hands.remove(hand)
        self._bar.update(-hand.shown)
        what = STARTING if hand.job is None else hand.job.name
        if hand.job is not None:
            self._left.insert(0, hand.job.again())
        if hand.shown > self._furthest[what]:
            self._furthest[what], self._losses[what] = hand.shown, 0
        elif hand.machine is None or hand.machine in {m["NodeID"] for m in _machines()}:
            self._losses[what] += 1
        reason = str(error).strip().splitlines()[0]
        if self._losses[what] >= MOST_LOSSES:
            raise EngineError(
                f"{MOST_LOSSES} workers were lost at {what} (out of memory?): {reason}"
            )
        logger.warning("A worker was lost at %s; another goes on with it. (%s)", what, reason)

    def _look(self) -> None:
        """Move the bar by what workers have done of their jobs so far."""
        now = time.monotonic()
        for hand in self._hands:
            if hand.machine is not None:
                self._seen = now
            if hand.job is None:
                continue
            if hand.progress is not None and ray.wait([hand.progress], timeout=0)[0]:
                self._show(hand)
            elif hand.progress is None:
                hand.progress = hand.actor.units.options(concurrency_group=PROGRESS).remote()
        names = ", ".join(hand.job.name for hand in self._hands if hand.job is not None)
        self._bar.set_description(names[:40] or "waiting for workers")
        if now - self._seen > WAITING:
            logger.warning("No worker was ready for the last %.0f s; still waiting.", WAITING)
            self._seen = now

    def _show(self, hand: _Hand) -> None:
        try:
            units = min(ray.get(hand.progress), hand.job.size)
        except ray.exceptions.RayError:  # it is lost, which its job's answer will tell
            return
        hand.progress = None
        if units > hand.shown:
            self._bar.update(units - hand.shown)
            hand.shown = units


def _answers(asked: list[Any]) -> list[Any]:
    """Those of the references `asked` whose answers have come after a moment."""
    if not asked:
        return []
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=MOMENT)
    return list(ready)


def _cause(error: Any) -> Exception:
    """What a job raised over there, as if it had been raised here."""
    cause = error.cause
    if isinstance(cause, PhatgooseError):
        return cause
    return EngineError(f"A worker failed: {str(error).strip().splitlines()[-1]}")
