"""Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md).

settings.py        what a server serves, as plain values that travel between processes
api/               requests and responses in OpenAI's form
guards/            who may use the server, how much a request may send, how long it may take
engine/            one thread that generates all answers, in batches
deadline.py        the time by which a request must be answered
api_errors.py      errors in the form that OpenAI's clients know
metrics.py         what Prometheus reads at /metrics
uvicorn_server.py  the application under uvicorn
"""

from __future__ import annotations

from ...errors import ConfigError
from .settings import API_KEYS, ServedModel, keys_of, served_models

try:
    from .api.app import create_app
    from .uvicorn_server import check_address, run
except ModuleNotFoundError as error:
    raise ConfigError(f"The server needs {error.name}: pip install 'phatgoose[serve]'.") from error

__all__ = ["API_KEYS", "ServedModel", "check_address", "create_app", "keys_of", "run"]
__all__ += ["served_models"]
