"""Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md).

settings.py        what a server serves, as plain values that travel between processes
api_errors.py      errors in the form that OpenAI's clients know
metrics.py         what Prometheus reads at /metrics
uvicorn_server.py  the application under uvicorn
app.py             the FastAPI application, its routes, errors and page
schema.py          request and response bodies: OpenAI's fields, and ours for routing
guards.py          who may use the server, how much a request may send, how long it may take
requests.py        a body's bytes to prompts as tokens and decoding settings, at bounded cost
readers.py         threads that turn requests into tokens, a few at a time
service.py         what the routes call: finds the model, starts the request, follows it
engine.py          one thread that generates all answers, in batches
sequences.py       one answer while it is generated
models.py          the served models, and one forward pass of each
routing_cache.py   routings that requests ask for, composed off the engine's thread
responses.py       progress to JSON: whole responses and chunks of a stream
"""

from __future__ import annotations

from ...errors import ConfigError
from .settings import API_KEYS, ServedModel, keys_of, served_models

try:
    from .app import create_app
    from .uvicorn_server import check_address, run
except ModuleNotFoundError as error:
    raise ConfigError(f"The server needs {error.name}: pip install 'phatgoose[serve]'.") from error

__all__ = ["API_KEYS", "ServedModel", "check_address", "create_app", "keys_of", "run"]
__all__ += ["served_models"]
