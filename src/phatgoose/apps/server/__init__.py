"""Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md).

A request passes connections (limits on sockets, under uvicorn), guards (it is counted, allowed and
read), app (its route), service, requests (its bytes become tokens), engine (batches of sequences
pass through models) and responses. In front of another engine `gateway` stands for service, and
forwarding for engine. `protocol` has the bodies and errors, `settings` the models' places as an
operator writes them.
"""

from __future__ import annotations

from ...errors import ConfigError
from .settings import API_KEYS, ServedModel, keys_of, served_models

try:
    from .app import create_app
    from .connections import check_address, leave, run
    from .upstream import UPSTREAM_KEY, Upstream
except ModuleNotFoundError as error:
    raise ConfigError(f"The server needs {error.name}: pip install 'phatgoose[serve]'.") from error

__all__ = ["API_KEYS", "ServedModel", "check_address", "create_app", "keys_of", "leave"]
__all__ += ["UPSTREAM_KEY", "Upstream", "run", "served_models"]
