"""Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md).

A request passes guards (it is counted, allowed and read), service (whose methods are the routes
that app declares), requests (its texts become tokens), local/ (batches of sequences pass through
models) and replies. In front of another engine upstream/ stands for local/: both are a `Backend`.
`protocol` has bodies and errors, `turns` the queues in which clients wait, `settings` the models'
places as an operator writes them. docs/design.md draws the way of a chat.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ...errors import ConfigError
from .settings import API_KEYS, UPSTREAM_KEY, ServedModel, Upstream, keys_of, served_models

if TYPE_CHECKING:
    from .app import create_app, leave, run

__all__ = ["API_KEYS", "UPSTREAM_KEY", "ServedModel", "Upstream", "create_app", "keys_of"]
__all__ += ["leave", "run", "served_models"]


def __getattr__(name: str) -> object:  # what serves loads torch, the settings don't
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(".app", __name__), name)
    except ModuleNotFoundError as error:
        wanted = f"The server needs {error.name}: pip install 'phatgoose[serve]'."
        raise ConfigError(wanted) from error
