"""Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md).

A request passes guards (it is counted, allowed and read), service (whose methods are the routes
that app declares), requests (its texts become tokens), local/ (batches of sequences pass through
models) and replies. In front of another engine upstream/ stands for local/: both are a `Backend`.
`protocol` has bodies and errors, `settings` the models' places as an operator writes them.
"""

from __future__ import annotations

from ...errors import ConfigError
from .settings import API_KEYS, UPSTREAM_KEY, ServedModel, Upstream, keys_of, served_models

try:
    from .app import create_app, leave, run
except ModuleNotFoundError as error:
    raise ConfigError(f"The server needs {error.name}: pip install 'phatgoose[serve]'.") from error

__all__ = ["API_KEYS", "UPSTREAM_KEY", "ServedModel", "Upstream", "create_app", "keys_of"]
__all__ += ["leave", "run", "served_models"]
