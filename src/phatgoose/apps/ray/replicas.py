"""The server's application on Ray Serve: several replicas of it behind one address."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ...config import Serving
from ...errors import ConfigError, EngineError
from ...jobs import absolute
from ..server import ServedModel, create_app
from .connection import ray

try:
    from ray import serve
    from ray.serve.config import HTTPOptions
except ImportError as error:
    raise ConfigError("Replicas need Ray Serve: pip install 'phatgoose[ray]'.") from error

__all__ = ["replicated", "run_replicas"]

NAME = "phatgoose"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
AT_WORK = 256  # requests being computed in a replica beside those in its queue, at most


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
    """So many replicas of the server's application at one address while the context is open.

    Each opens all models and has a queue and limits of its own; a replica that dies is replaced,
    and its unfinished requests fail. Raises EngineError when they can't be started.
    """
    here = [_elsewhere(model) for model in models]

    def build() -> Any:
        return create_app(here, serving, api_keys, hosts)

    deployment = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        # The application turns away what its queue has no room for, so Ray must not hold it back.
        max_ongoing_requests=serving.max_queue + AT_WORK,
        graceful_shutdown_timeout_s=serving.shutdown_timeout,
        ray_actor_options={"num_cpus": cpus_per_replica, "num_gpus": gpus_per_replica},
    )(serve.ingress(build)())
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(deployment.bind(), name=NAME, route_prefix="/")
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        serve.shutdown()
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"The replicas could not be started: {reason}") from error
    try:
        yield
    finally:
        serve.shutdown()


def run_replicas(*arguments: Any, **options: Any) -> None:
    """As `replicated`, until SIGTERM or SIGINT. Must be called in the main thread."""
    told = threading.Event()
    with replicated(*arguments, **options):
        before = {number: signal.signal(number, lambda *_: told.set()) for number in SIGNALS}
        try:
            while not told.is_set():  # in short waits: a signal doesn't end a long one everywhere
                with suppress(InterruptedError):
                    told.wait(1.0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _elsewhere(model: ServedModel) -> ServedModel:
    """The model by places that are found from any working directory."""
    base = None if model.base is None else absolute(model.base)
    scores = None if model.scores is None else absolute(model.scores)
    return replace(model, place=absolute(model.place), base=base, scores=scores)
