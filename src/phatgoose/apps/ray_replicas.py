"""The server's application on Ray Serve: several replicas behind one address."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ..config import Serving
from ..errors import ConfigError, EngineError
from ..files.strict import first_line
from ..jobs import absolute
from .processor import keep_to
from .ray_engine import ray
from .server import ServedModel, create_app
from .server.connections import handling_signals

try:
    from ray import serve
    from ray.serve.config import HTTPOptions
except ImportError as error:
    raise ConfigError("Replicas need Ray Serve: pip install 'phatgoose[ray]'.") from error


NAME = "phatgoose"
RUNNING = 256  # most requests that a replica computes besides those in its queue


@contextmanager
def replicated(
    models: Sequence[ServedModel],
    serving: Serving,
    api_keys: Sequence[str],
    hosts: Sequence[str] = (),
    *,
    replicas: int,
    host: str,
    port: int,
    gpus_per_replica: float = 0.0,
    cpus_per_replica: float = 1.0,
) -> Iterator[None]:
    """Run replicas of the server's application behind one address while the context is open.

    Each opens all models and has its own queue and limits. A replica that dies is replaced, and its
    unfinished requests fail. Raises EngineError when the replicas can't be started.
    """
    portable = [_portable(model) for model in models]

    def build() -> Any:
        keep_to(cpus_per_replica)
        return create_app(portable, serving, api_keys, hosts)

    deployment = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        # The application refuses what its queue has no room for, so Ray need not limit requests.
        max_ongoing_requests=serving.max_queue + RUNNING,
        graceful_shutdown_timeout_s=serving.shutdown_timeout,
        ray_actor_options={"num_cpus": cpus_per_replica, "num_gpus": gpus_per_replica},
    )(serve.ingress(build)())
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(deployment.bind(), name=NAME, route_prefix="/")
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        serve.shutdown()
        raise EngineError(f"The replicas could not be started: {first_line(error)}.") from error
    try:
        yield
    finally:
        serve.shutdown()


def run_replicas(*arguments: Any, **options: Any) -> None:
    """Serve replicas, as `replicated` takes them, until a signal says to stop."""
    stopped = threading.Event()
    with replicated(*arguments, **options), handling_signals(lambda *_: stopped.set()):
        while not stopped.is_set():  # a long wait isn't ended by a signal on every platform
            with suppress(InterruptedError):
                stopped.wait(1.0)


def _portable(model: ServedModel) -> ServedModel:
    base = None if model.base is None else absolute(model.base)
    scores = None if model.scores is None else absolute(model.scores)
    return replace(model, place=absolute(model.place), base=base, scores=scores)
