"""What a server serves and within which limits, as plain values that travel between processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from ...config import Routing
from ...errors import ConfigError

__all__ = ["API_KEYS", "ServedModel", "ServerSettings", "keys_of", "served_models"]

API_KEYS = "PHATGOOSE_API_KEYS"  # the environment's keys, separated by commas


@dataclass(frozen=True)
class ServedModel:
    """A model to serve under `name`: a routed one's folder, a pool (composed by `routing`), a base.

    `keep`, `leave_out` and `scores` are those of `compose`; `base` None means the one the pool or
    the routed model names. What a saved routed model was made with stays as it is.
    """

    name: str
    place: str
    routing: Routing = field(default_factory=Routing)
    keep: tuple[str, ...] | None = None
    leave_out: tuple[str, ...] = ()
    base: str | None = None
    dtype: str = "auto"
    scores: str | None = None


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server; every one of them is a whole number above 0.

    `max_body` bytes of a request; `max_tokens` generated for one answer at most; `max_queue`
    answers waiting before requests are turned away; `max_batch_tokens` held by all answers that are
    computed together, prompts and padding included; `max_choices` answers of one request;
    `max_variants` routings kept in memory beside those served by name; `timeout` seconds for a
    request, its wait included; `shutdown_timeout` seconds for running requests when the server
    stops. Without `api_keys` everybody is let in.
    """

    api_keys: tuple[str, ...] = ()
    max_body: int = 1 << 20
    max_tokens: int = 1024
    max_queue: int = 256
    max_batch_tokens: int = 16384
    max_choices: int = 16
    max_variants: int = 8
    timeout: int = 300
    shutdown_timeout: int = 30

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "api_keys" and (type(value) is not int or value < 1):
                raise ConfigError(f"{each.name} is {value!r}, but must be at least 1.")
        if not all(self.api_keys):
            raise ConfigError("An API key is empty.")


def served_models(places: Sequence[str], **options: object) -> list[ServedModel]:
    """The models in `places`, each "PLACE" or "NAME=PLACE"; `options` are theirs.

    Without a name, a folder's or file's own is taken, or what follows "hub:". Raises ConfigError
    when two have one name or there is none.
    """
    models = [ServedModel(*_named(place), **options) for place in places]  # type: ignore[arg-type]
    names = [model.name for model in models]
    if not names:
        raise ConfigError("There is no model to serve.")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two models are called {name!r}; say NAME=PLACE for one of them.")
    return models


def keys_of(environment: str | None) -> tuple[str, ...]:
    """The API keys in a list separated by commas; none in None."""
    return tuple(key.strip() for key in (environment or "").split(",") if key.strip())


def _named(place: str) -> tuple[str, str]:
    """(name, place) of "NAME=PLACE" or "PLACE"; a path that exists is never taken for a pair."""
    name, separator, rest = place.partition("=")
    if separator and name and rest and not os.path.exists(place):
        return name, rest
    if place.startswith("hub:"):
        return place.removeprefix("hub:"), place
    path = Path(place)
    return (path.stem if path.suffix == ".json" else path.resolve().name) or place, place
