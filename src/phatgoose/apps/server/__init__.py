"""Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md).

`create_app(models, settings)` is the application; `run` serves it with uvicorn. Both take plain
values only, so that another process can do the same.
"""

from __future__ import annotations

from ...errors import ConfigError
from .settings import API_KEYS, ServedModel, ServerSettings, keys_of, served_models

try:
    from .app import create_app
    from .running import run
except ImportError as error:
    raise ConfigError(
        f"The server needs {error.name}: pip install 'phatgoose[serve]'."
    ) from error

__all__ = [
    "API_KEYS",
    "ServedModel",
    "ServerSettings",
    "create_app",
    "keys_of",
    "run",
    "served_models",
]
