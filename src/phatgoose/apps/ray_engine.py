"""Jobs on a Ray cluster: the connection, workers, and the engine that replaces lost ones."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, EngineError, PhatgooseError
from ..files import first_line, one_line
from ..jobs import AnyJob, AnyResult, Job, Workshop
from .console import complain
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
    ended = threading.Event()
    threading.Thread(target=_watch, args=(ended, _servers()), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        ray.shutdown()


def _servers() -> list[tuple[str, int]]:
    """Where the cluster's head and this machine's node listen, if they can be reached from here."""
    here = ray.get_runtime_context()
    own = [each for each in _machines() if each["NodeID"] == here.get_node_id()]
    places = [(each["NodeManagerAddress"], each["NodeManagerPort"]) for each in own]
    host, _, port = here.gcs_address.rpartition(":")
    return [place for place in ((host, int(port)), *places) if _listens(*place)]


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _watch(ended: threading.Event, servers: list[tuple[str, int]]) -> None:
    """End the process with a line when one of `servers` is gone; Ray would end it without one."""
    missed = 0
    while missed < 10:  # Ray itself waits longer, and then ends at once
        if ended.wait(1):
            return
        missed = 0 if all(_listens(*each) for each in servers) else missed + 1
    complain("error", "Ray's node died (out of memory?). Run the command again.", "bold red")
    os._exit(1)


PROGRESS = "progress"  # the thread that answers `units` while a job runs


class Worker:
    """The Ray actor: it opens a workshop once and does one job after another with it."""

    def __init__(self, workshop: list[Any], folder: str, cpus: float) -> None:
        self._workshop, self._units, self._cpus = workshop, 0, cpus
        with suppress(OSError):  # a machine without the folder needs absolute paths
            os.chdir(folder)

    def open(self) -> str:
        keep_to(self._cpus)
        # Fetched here: when Ray fetches it, it takes any error for a lost worker.
        workshop: Workshop[Any, Any] = ray.get(self._workshop[0])
        self._context = workshop.open(self._tell)
        self._work = self._context.__enter__()
        return str(ray.get_runtime_context().get_node_id())

    def do(self, job: Job) -> Any:
        self._units = 0
        return self._work(job)

    def units(self) -> int:
        return self._units

    def _tell(self, units: int) -> None:
        self._units += units


logger = logging.getLogger(__name__)

POLLING = 0.5  # seconds between two updates of the progress bar
MOST_LOSSES = 3  # of workers at one job without progress, on machines that are still there
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

    def run(
        self, workshop: Workshop[AnyJob, AnyResult], jobs: Sequence[AnyJob], bar: Any
    ) -> Generator[tuple[AnyJob, AnyResult], None, None]:
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
            gpus = 1.0 if any("GPU" in node["Resources"] for node in _machines()) else 0.0
        cpus = 1.0 if self.cpus_per_worker is None else self.cpus_per_worker
        return {"CPU": cpus, "GPU": gpus}

    def room(self) -> int:
        needs = self.needs()
        fit = _fitting(needs)
        if not fit:
            wanted = " and ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            raise EngineError(f"No machine of the cluster has {wanted}, which a worker needs.")
        return fit if self.workers is None else self.workers


def job_for(group: str | None, taken: Iterable[str | None], left: Sequence[Any]) -> Any:
    """The job of `left`, which isn't empty, for a worker of `group`, while others are at `taken`.

    The first of its own group, else of the group with the most jobs that no worker will take.
    """
    sizes = Counter(job.group for job in left)
    for other in taken:
        if other in sizes:
            sizes[other] -= 1  # its worker will take the next one
    chosen = group if group in sizes else max(sizes, key=lambda name: sizes[name])
    return next(job for job in left if job.group == chosen)


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
    shown: int = 0  # units of its job that the bar shows
    progress: Any = None  # reference to the units that it was asked for


class _Run:
    def __init__(self, engine: RayEngine, workshop: Any, jobs: list[Any], bar: Any) -> None:
        self._engine, self._workshop, self._bar = engine, workshop, bar
        self._left = jobs
        self._workers: list[_WorkerHandle] = []
        self._losses: Counter[str] = Counter()
        self._furthest: Counter[str] = Counter()  # units of a job that were done when it was lost
        self._needs = engine.needs()
        engine.room()  # raises at once if no machine is large enough
        self._seen = time.monotonic()

    @property
    def is_unfinished(self) -> bool:
        return bool(self._left) or any(worker.job is not None for worker in self._workers)

    def step(self) -> Generator[tuple[Any, Any], None, None]:
        """Start workers, assign jobs and wait briefly; yields the results that have come."""
        self._start_workers()
        self._assign()
        waiting = {each.answer: each for each in self._workers if each.answer is not None}
        if not waiting:  # all machines are gone; others may come
            time.sleep(POLLING)
        for reference in _ready(list(waiting)):
            yield from self._receive(waiting[reference])
        self._update_bar()

    def stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)

    def _start_workers(self) -> None:
        busy = sum(worker.job is not None for worker in self._workers)
        room = self._engine.workers or _fitting(self._needs)  # machines come and go
        wanted = min(room, busy + len(self._left))
        while len(self._workers) < wanted:
            cpus, gpus = self._needs["CPU"], self._needs["GPU"]
            # Ray could restart a lost worker, but wouldn't say which job it had.
            options = {"max_restarts": 0, "concurrency_groups": {PROGRESS: 1}}
            kind = ray.remote(num_gpus=gpus, num_cpus=cpus, **options)(Worker)
            actor = kind.remote([self._workshop], os.getcwd(), cpus)
            self._workers.append(_WorkerHandle(actor, actor.open.remote()))

    def _assign(self) -> None:
        for worker in self._workers:
            if worker.answer is not None or not self._left:
                continue
            taken = [other.group for other in self._workers if other.job is not None]
            worker.job = job_for(worker.group, taken, self._left)
            self._left.remove(worker.job)
            worker.group, worker.shown, worker.progress = worker.job.group, 0, None
            worker.answer = worker.actor.do.remote(worker.job)

    def _receive(self, worker: _WorkerHandle) -> Generator[tuple[Any, Any], None, None]:
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
        self._bar.update(job.size - worker.shown)
        yield job, answer

    def _drop(self, worker: _WorkerHandle, error: Exception) -> None:
        ray.kill(worker.actor)
        self._workers.remove(worker)
        self._bar.update(-worker.shown)
        what = STARTING if worker.job is None else worker.job.name
        if worker.job is not None:
            self._left.insert(0, worker.job.again())
        # A loss after progress doesn't count, nor does one with its whole machine.
        if worker.shown > self._furthest[what]:
            self._furthest[what], self._losses[what] = worker.shown, 0
        elif worker.machine is None or worker.machine in {m["NodeID"] for m in _machines()}:
            self._losses[what] += 1
        reason = first_line(error)
        if self._losses[what] >= MOST_LOSSES:
            raise EngineError(
                f"{MOST_LOSSES} workers were lost at {what} (out of memory?): {reason}."
            )
        logger.warning("A worker was lost at %s; another continues. (%s)", what, reason)

    def _update_bar(self) -> None:
        """Show what workers have done of their jobs, and warn while there is no worker."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.machine is not None:
                self._seen = now
            if worker.job is None:
                continue
            if worker.progress is None:
                units = worker.actor.units.options(concurrency_group=PROGRESS)
                worker.progress = units.remote()
            elif ray.wait([worker.progress], timeout=0)[0]:
                self._show(worker)
        names = ", ".join(each.job.name for each in self._workers if each.job is not None)
        self._bar.set_description(one_line(names, 40) or "waiting for workers")
        if now - self._seen > WAITING:
            logger.warning("No worker was ready for the last %.0f s; still waiting.", WAITING)
            self._seen = now

    def _show(self, worker: _WorkerHandle) -> None:
        try:
            units = min(ray.get(worker.progress), worker.job.size)
        except ray.exceptions.RayError:  # it is lost, which `_receive` will see
            return
        worker.progress = None
        if units > worker.shown:
            self._bar.update(units - worker.shown)
            worker.shown = units


def _ready(references: list[Any]) -> list[Any]:
    if not references:
        return []
    ready, _ = ray.wait(references, num_returns=len(references), timeout=POLLING)
    return list(ready)


def _cause(error: Any) -> Exception:
    cause = error.cause
    if isinstance(cause, PhatgooseError):
        return cause
    *_, last = str(error).strip().splitlines() or [type(cause).__name__]  # of a whole traceback
    return EngineError(f"A worker failed: {one_line(last)}")
