"""Jobs on a Ray cluster: the connection, workers, and the engine that replaces lost ones."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import ConfigError, EngineError, PhatgooseError
from ..files import first_line, one_line
from ..jobs import Engine, Results
from .processor import bound_spinning

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
PASSED_ON = (  # how the names begin of variables that workers need
    "GOMP_SPINCOUNT",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "OMP_WAIT_POLICY",
    "PHATGOOSE_",
    "PYTHONPATH",
    "TOKENIZERS_PARALLELISM",
)


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect to the cluster at `address`; without one, to a new cluster of this machine alone.

    `address` is HOST:PORT, ray://HOST:PORT or "auto" (the cluster that this machine is part of). An
    existing connection is used and left open. Raises EngineError when no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, object] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    if address is not None:  # workers on other machines should have these variables too
        passed_on = {k: value for k, value in os.environ.items() if k.startswith(PASSED_ON)}
        options = {"runtime_env": {"env_vars": passed_on}}
    try:
        ray.init(address or "local", logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"No Ray cluster could be used at {address or 'here'}: {first_line(error)}."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _done(workshop: list[Any], folder: str, job: Any) -> Any:
    """What comes of a job in a worker's process, which opens the workshop once."""
    key = workshop[0].hex()
    if key not in _opened:
        _opened.clear()
        with suppress(OSError):  # a machine without the folder needs absolute paths
            os.chdir(folder)
        torch.set_num_threads(1)
        # Fetched here: when Ray fetches it, it takes any error for a lost worker.
        context = ray.get(workshop[0]).open()
        _opened[key] = context, context.__enter__()
    _, work = _opened[key]
    return work(job)


_opened = dict[str, tuple[Any, Any]]()  # this process's workshop and what does its jobs

logger = logging.getLogger(__name__)

MOST_LOSSES = 3  # of workers at one job


@dataclass
class RayEngine(Engine):
    """Runs jobs on the cluster that this process is connected to (see `connected`).

    A lost worker's job goes `again` to another one, which needs only the job's own folder. If this
    process dies, its workers end; the next run of the same jobs finds what they have finished.

    A worker has a core, and a GPU if the cluster has any. `workers` None means as many as fit.
    """

    workers: int | None = None
    remote: ClassVar[bool] = True

    def run(self, workshop: Any, jobs: Sequence[Any], bar: Any) -> Results:
        """(job, result) of each of `jobs` as soon as it is done, in any order.

        Raises what a job raises, and EngineError after repeated losses.
        """
        if not jobs:
            return
        has_gpu = "GPU" in ray.cluster_resources()
        # Otherwise Ray would end a worker with a GPU after each job, and would repeat a job whose
        # worker was lost from its beginning.
        limits = {"max_calls": 0, "max_retries": 0}
        task = ray.remote(num_cpus=1, num_gpus=int(has_gpu), **limits)(_done)
        place = [ray.put(workshop.portable())]
        left = list(jobs)
        losses = Counter[str]()
        running = dict[object, Any]()
        try:
            while left or running:
                while left and len(running) < (self.workers or len(jobs)):
                    job = left.pop(0)
                    running[task.remote(place, os.getcwd(), job)] = job
                (answer,), _ = ray.wait(list(running))
                job = running.pop(answer)
                try:
                    result = ray.get(answer)
                except ray.exceptions.RayTaskError as error:  # the job itself raised
                    raise _cause(error) from None
                except ray.exceptions.RayError as error:
                    losses[job.name] += 1
                    if losses[job.name] == MOST_LOSSES:
                        raise EngineError(
                            f"{MOST_LOSSES} workers were lost at {job.name} (out of memory?): "
                            f"{first_line(error)}."
                        ) from None
                    words = "A worker was lost at %s; another continues. (%s)"
                    logger.warning(words, job.name, first_line(error))
                    left.insert(0, job.again())
                else:
                    bar.update(job.size)
                    yield job, result
        finally:
            for answer in running:
                ray.cancel(answer, force=True)


def _cause(error: ray.exceptions.RayTaskError) -> Exception:
    cause: Exception = error.cause
    if isinstance(cause, PhatgooseError):
        return cause
    *_, last = str(error).strip().splitlines() or [type(cause).__name__]  # of a whole traceback
    return EngineError(f"A worker failed: {one_line(last)}")
