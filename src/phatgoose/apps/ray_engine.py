"""Jobs on a Ray cluster: the connection, workers, and the engine that replaces lost ones."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ..errors import ConfigError, EngineError, PhatgooseError
from ..files import first_line, one_line
from ..jobs import Job, Results, Workshop
from .processor import bound_spinning, keep_to

bound_spinning()  # workers get it, with the environment of this process or by `connected`
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts a cluster
# Ray would give workers a lower priority than the command that they work for.
os.environ.setdefault("RAY_worker_niceness", "0")
# Otherwise Ray warns in every worker that uses no GPU.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray as ray  # it reads the variables above when it is imported
except ImportError as error:
    raise ConfigError("The engine ray needs Ray: pip install 'phatgoose[ray]'.") from error


OBJECT_STORE = 256 * 2**20  # bytes; datasets pass through it, models and experts don't
PASSED_ON = (
    "GOMP_SPINCOUNT",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "OMP_WAIT_POLICY",
    "PYTHONPATH",
    "TOKENIZERS_PARALLELISM",
)
OURS = "PHATGOOSE_"


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect to the cluster at `address`; without one, to a new cluster of this machine alone.

    `address` is HOST:PORT, ray://HOST:PORT or "auto" (the cluster that this machine is part of). An
    existing connection is used and left open. Raises EngineError when no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
    }
    if address is not None:  # workers on other machines should have these variables too
        passed_on = {
            name: value
            for name, value in os.environ.items()
            if name in PASSED_ON or name.startswith(OURS)
        }
        options = {"address": address, "runtime_env": {"env_vars": passed_on}}
    try:
        ray.init(logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"No Ray cluster could be used at {address or 'here'}: {first_line(error)}."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class Worker:
    """The Ray actor: it opens a workshop once and does one job after another with it."""

    def __init__(self, workshop: list[Any], folder: str, cpus: float) -> None:
        self._workshop, self._cpus = workshop, cpus
        with suppress(OSError):  # a machine without the folder needs absolute paths
            os.chdir(folder)

    def open(self) -> str:
        keep_to(self._cpus)
        # Fetched here: when Ray fetches it, it takes any error for a lost worker.
        workshop: Workshop = ray.get(self._workshop[0])
        self._context = workshop.open()
        self._work = self._context.__enter__()
        return str(ray.get_runtime_context().get_node_id())

    def do(self, job: Job) -> Any:
        return self._work(job)


logger = logging.getLogger(__name__)

POLLING = 0.5  # seconds to wait for results at a time
MOST_LOSSES = 3  # of workers at one job, on machines that are still there
STARTING = "a worker that was starting"
WAITING = 30.0  # seconds without any worker after which the log says so


@dataclass
class RayEngine:
    """Runs jobs on the cluster that this process is connected to (see `connected`).

    A lost worker's job goes `again` to another one, which needs only the job's own folder. If this
    process dies, its workers end; the next run of the same jobs finds what they have finished.

    `workers` None means as many as fit, `gpus_per_worker` None one if the cluster has any.
    `cpus_per_worker` (None: 1) is also the number of a worker's threads.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float | None = None
    remote: bool = field(default=True, init=False)

    def run(self, workshop: Workshop, jobs: Sequence[Job], bar: Any) -> Results:
        """(job, result) of each of `jobs` as soon as it is done, in any order.

        Raises what a job raises, and EngineError without room for a worker or after repeated
        losses.
        """
        if not jobs:
            return
        run = _Run(self, ray.put(workshop.portable()), list(jobs), bar)
        try:
            while run.is_unfinished:
                yield from run.step()
        finally:
            run.stop()

    def needs(self) -> dict[str, float]:
        gpus = self.gpus_per_worker
        if gpus is None:
            gpus = float(any("GPU" in node["Resources"] for node in _machines()))
        return {"CPU": 1.0 if self.cpus_per_worker is None else self.cpus_per_worker, "GPU": gpus}

    def room(self) -> int:
        """The number of workers that there may be now."""
        return self.workers or _fitting(self.needs())


def job_for(group: str | None, taken: Sequence[str | None], left: Sequence[Any]) -> Any:
    """The job of `left`, which isn't empty, for a worker of `group`, while others are at `taken`.

    The first of its own group, else of a group that no worker is at.
    """
    own = (job for job in left if job.group == group)
    free = (job for job in left if job.group not in taken)
    return next(chain(own, free, left))


def _fitting(needs: Mapping[str, float]) -> int:
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
class _WorkerHandle:
    actor: Any
    answer: Any  # reference to the answer that is waited for, None while the worker is idle
    job: Any = None
    machine: str | None = None  # None until its workshop is open
    group: str | None = None


class _Run:
    def __init__(self, engine: RayEngine, workshop: Any, jobs: list[Any], bar: Any) -> None:
        self._workshop, self._left, self._bar = workshop, jobs, bar
        self._workers: list[_WorkerHandle] = []
        self._losses: Counter[str] = Counter()
        self._engine, self._needs = engine, engine.needs()
        if not _fitting(self._needs):
            needs = " and ".join(f"{n:g} {name}" for name, n in self._needs.items() if n)
            raise EngineError(f"No machine of the cluster has {needs}, which a worker needs.")
        self._seen = time.monotonic()

    @property
    def is_unfinished(self) -> bool:
        return bool(self._left) or any(worker.job is not None for worker in self._workers)

    def step(self) -> Results:
        """Start workers, assign jobs and wait briefly; yields the results that have come."""
        self._start_workers()
        self._assign()
        waiting = {each.answer: each for each in self._workers if each.answer is not None}
        if not waiting:  # all machines are gone; others may come
            time.sleep(POLLING)
        else:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=POLLING)
            for reference in ready:
                yield from self._receive(waiting[reference])
        self._watch()

    def stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)

    def _start_workers(self) -> None:
        busy = sum(worker.job is not None for worker in self._workers)
        room = self._engine.room()  # machines come and go
        while len(self._workers) < min(room, busy + len(self._left)):
            cpus, gpus = self._needs["CPU"], self._needs["GPU"]
            # Ray could restart a lost worker, but wouldn't say which job it had.
            kind = ray.remote(num_gpus=gpus, num_cpus=cpus, max_restarts=0)(Worker)
            actor = kind.remote([self._workshop], os.getcwd(), cpus)
            self._workers.append(_WorkerHandle(actor, actor.open.remote()))

    def _assign(self) -> None:
        for worker in self._workers:
            if worker.answer is None and self._left:
                taken = [other.group for other in self._workers if other.job is not None]
                worker.job = job_for(worker.group, taken, self._left)
                self._left.remove(worker.job)
                worker.group = worker.job.group
                worker.answer = worker.actor.do.remote(worker.job)

    def _receive(self, worker: _WorkerHandle) -> Results:
        try:
            answer = ray.get(worker.answer)
        # The job itself raised; any other error of Ray's means that the worker is lost.
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            self._drop(worker, error)
            return
        worker.answer = None
        if worker.machine is None:
            worker.machine, self._seen = answer, time.monotonic()
            self._losses[STARTING] = 0
            return
        job, worker.job = worker.job, None
        self._bar.update(job.size)
        yield job, answer

    def _drop(self, worker: _WorkerHandle, error: Exception) -> None:
        ray.kill(worker.actor)
        self._workers.remove(worker)
        what = STARTING if worker.job is None else worker.job.name
        if worker.job is not None:
            self._left.insert(0, worker.job.again())
        # A loss with its whole machine doesn't count.
        if worker.machine is None or worker.machine in {m["NodeID"] for m in _machines()}:
            self._losses[what] += 1
        reason = first_line(error)
        if self._losses[what] >= MOST_LOSSES:
            raise EngineError(
                f"{MOST_LOSSES} workers were lost at {what} (out of memory?): {reason}."
            )
        logger.warning("A worker was lost at %s; another continues. (%s)", what, reason)

    def _watch(self) -> None:
        """Show what is worked on, and warn while there is no worker."""
        now = time.monotonic()
        if any(worker.machine is not None for worker in self._workers):
            self._seen = now
        names = ", ".join(each.job.name for each in self._workers if each.job is not None)
        self._bar.set_description(one_line(names, 40) or "waiting for workers")
        if now - self._seen > WAITING:
            logger.warning("No worker was ready for the last %.0f s; still waiting.", WAITING)
            self._seen = now


def _cause(error: Any) -> Exception:
    cause = error.cause
    if isinstance(cause, PhatgooseError):
        return cause
    *_, last = str(error).strip().splitlines() or [type(cause).__name__]  # of a whole traceback
    return EngineError(f"A worker failed: {one_line(last)}")
