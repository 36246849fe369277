"""The connection with a Ray cluster; the one module that imports Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import ConfigError, EngineError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts a cluster
# A worker is as urgent as the command that it works for; Ray would put it behind everything else.
os.environ.setdefault("RAY_worker_niceness", "0")
# What a worker told to leave GPUs alone would otherwise be warned of.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray
except ImportError as error:
    raise ConfigError("The engine ray needs Ray: pip install 'phatgoose[ray]'.") from error

__all__ = ["connected", "ray"]

OBJECT_STORE = 256 * 2**20  # bytes; datasets pass through it, models and experts don't
HANDED_ON = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TOKENIZERS_PARALLELISM")
OURS = "PHATGOOSE_"


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connected with the cluster at `address`, or with one of this machine that ends with it.

    `address` is HOST:PORT, ray://HOST:PORT or "auto" (the cluster that this machine is part of). A
    connection that exists already is used and left as it is. Raises EngineError when no cluster
    answers there.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
    }
    if address is not None:
        options = {"address": address, "runtime_env": {"env_vars": _environment()}}
    try:
        ray.init(logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(
            f"No Ray cluster could be used at {address or 'here'}: {reason}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _environment() -> dict[str, str]:
    """The variables of this process that its workers on other machines should have too."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in HANDED_ON or name.startswith(OURS)
    }
