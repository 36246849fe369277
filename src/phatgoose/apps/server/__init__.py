"""Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md).

`create_app(models, serving, api_keys)` is the application and `run` serves it with uvicorn. All of
it is made of plain values, so that replicas in other processes can be made of the same.
"""

from __future__ import annotations

from ...errors import ConfigError
from .settings import API_KEYS, ServedModel, keys_of, served_models

try:
    from .app import create_app
    from .running import run
except ModuleNotFoundError as error:
    raise ConfigError(f"The server needs {error.name}: pip install 'phatgoose[serve]'.") from error

__all__ = ["API_KEYS", "ServedModel", "create_app", "keys_of", "run", "served_models"]
