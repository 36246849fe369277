"""What a server serves, as plain values that travel between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import Routing
from ...errors import ConfigError

__all__ = ["API_KEYS", "ServedModel", "keys_of", "served_models"]

API_KEYS = "PHATGOOSE_API_KEYS"  # the environment's keys, separated by commas


@dataclass(frozen=True)
class ServedModel:
    """A model to serve under `name`: a routed one's folder, a pool (composed by `routing`), a base.

    `keep`, `leave_out` and `scores` are those of `compose`; `base` None means the one that the pool
    or the routed model names. `routing` None is the default one; a saved routed model has its own.
    """

    name: str
    place: str
    routing: Routing | None = None
    keep: tuple[str, ...] | None = None
    leave_out: tuple[str, ...] = ()
    base: str | None = None
    dtype: str = "auto"
    scores: str | None = None


def served_models(places: Sequence[str], **options: Any) -> list[ServedModel]:
    """The models in `places`, each "PLACE" or "NAME=PLACE"; `options` are those of all of them.

    Without a name, a folder's or file's own is taken, or what follows "hub:". Raises ConfigError
    when there is none or two have one name.
    """
    models = [ServedModel(*_named(place), **options) for place in places]
    names = [model.name for model in models]
    if not names:
        raise ConfigError("There is no model to serve.")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two models are called {name!r}; say NAME=PLACE for one of them.")
    return models


def keys_of(listed: str | None) -> tuple[str, ...]:
    """The API keys in a list separated by commas; none in None."""
    return tuple(key.strip() for key in (listed or "").split(",") if key.strip())


def _named(place: str) -> tuple[str, str]:
    """(name, place) of "NAME=PLACE" or "PLACE"; a path that exists is never taken for a pair."""
    name, separator, rest = place.partition("=")
    if separator and name and rest and not Path(place).exists():
        return name, rest
    if place.startswith("hub:"):
        return place.removeprefix("hub:"), place
    path = Path(place)
    return (path.stem if path.suffix == ".json" else path.resolve().name) or place, place
