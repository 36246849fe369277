"""Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md).

api/         The protocol: requests in OpenAI's form, and replies
doors/       The doors: who may come in, how much they may send, and for how long
engine/      The engine: one thread that computes all answers, in batches
metrics.py   What Prometheus reads at /metrics
refusals.py  Requests turned away, in the form that OpenAI's clients know
running.py   The application under uvicorn
settings.py  What a server serves, as plain values that travel between processes
"""

from __future__ import annotations

from ...errors import ConfigError
from .settings import API_KEYS, ServedModel, keys_of, served_models

try:
    from .api.app import create_app
    from .running import run
except ModuleNotFoundError as error:
    raise ConfigError(f"The server needs {error.name}: pip install 'phatgoose[serve]'.") from error

__all__ = ["API_KEYS", "ServedModel", "create_app", "keys_of", "run", "served_models"]
