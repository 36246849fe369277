"""The connection to a Ray cluster; the only module that imports Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import ConfigError, EngineError
from ...files.quoting import first_line
from ..processor import bound_spinning

bound_spinning()  # workers get it, with the environment of this process or by `_environment`
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts a cluster
# Ray would give workers a lower priority than the command that they work for.
os.environ.setdefault("RAY_worker_niceness", "0")
# Otherwise Ray warns in every worker that uses no GPU.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray
except ImportError as error:
    raise ConfigError("The engine ray needs Ray: pip install 'phatgoose[ray]'.") from error

__all__ = ["connected", "ray"]

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
    if address is not None:
        options = {"address": address, "runtime_env": {"env_vars": _environment()}}
    try:
        ray.init(logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"No Ray cluster could be used at {address or 'here'}: {first_line(error)}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _environment() -> dict[str, str]:
    """The variables of this process that workers on other machines should have too."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ON or name.startswith(OURS)
    }
