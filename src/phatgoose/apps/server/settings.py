"""What a server serves, as plain values that travel between processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ...config import Routing, from_mapping, read_text, settings_of
from ...errors import ConfigError
from ...files import shortened

API_KEYS = "PHATGOOSE_API_KEYS"  # the environment's keys, separated by commas


@dataclass(frozen=True)
class ServedModel:
    """A model to serve as `name`: a routed model's folder, a pool composed by `routing`, a base.

    `keep`, `leave_out` and `scores` are those of `compose`; None means the model's own or default.
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
    """The models in `places`: "PLACE", "NAME=PLACE", or either with a pool's routing after it.

    A routing is written like the query of an address: "arrow=experts?router=arrow&k=3". It changes
    the routing in `options`, which hold for all models. Without NAME the model has its folder's or
    file's name, or what follows "hub:".
    """
    models = [_served(place, options) for place in places]
    names = [model.name for model in models]
    if not names:
        raise ConfigError("There is no model to serve.")
    for name in names:
        if not (name and name.isprintable()):
            raise ConfigError(
                f"A model can't be called {shortened(name)}; write NAME=PLACE with a printable "
                f"name."
            )
        if names.count(name) > 1:
            raise ConfigError(f"Two models are called {name!r}; write NAME=PLACE for one of them.")
    return models


def keys_of(listed: str | None, given: Sequence[str] = ()) -> tuple[str, ...]:
    """The API keys `given` one by one, and those in a list separated by commas."""
    if not all(key.strip() for key in given):
        raise ConfigError("An API key is empty; leave it out, or write --api-key KEY.")
    return tuple(key.strip() for key in (*given, *(listed or "").split(",")) if key.strip())


def _served(written: str, options: Mapping[str, Any]) -> ServedModel:
    if Path(written).exists():  # whatever characters its name has
        return ServedModel(_name_of(written), written, **options)
    before, _, query = written.partition("?")
    name, separator, place = before.partition("=")
    if not (separator and name and place):
        name, place = _name_of(before), before
    return ServedModel(name, place, **{**options, "routing": _routing(query, options, written)})


def _routing(query: str, options: Mapping[str, Any], written: str) -> Routing | None:
    common: Routing | None = options.get("routing")
    if not query:
        return common
    types = {setting.name: setting.type for setting in settings_of(Routing)}
    values = {name: read_text(value, types.get(name)) for name, value in _pairs(query, written)}
    given = asdict(common) if common is not None else {}
    return from_mapping(Routing, {**given, **values}, written)


def _pairs(query: str, written: str) -> list[tuple[str, str]]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise ConfigError(
            f"{written}: {query!r} is not a routing; write router=NAME&k=2."
        ) from error
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ConfigError(f"{written}: {shortened(name)} is given {count} times; once will do.")
    return pairs


def _name_of(place: str) -> str:
    if place.startswith("hub:"):
        return place.removeprefix("hub:")
    path = Path(place)
    return (path.stem if path.suffix == ".json" else path.resolve().name) or place
