"""What a server serves, and the engine behind it, as an operator writes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ...config import Routing, from_mapping, read_text, settings_of
from ...errors import ConfigError
from ...files import shortened

API_KEYS = "PHATGOOSE_API_KEYS"  # the environment's keys, separated by commas
UPSTREAM_KEY = "PHATGOOSE_UPSTREAM_KEY"  # the environment's key for the engine
AUTO = "auto"
ENGINES = ("vllm", "sglang", "llama.cpp")
ADDRESS = r"(?i:https?)://([\w.-]+|\[[\w:.%]+\])(:[0-6]?\d{1,4})?(/[!->@-~]*)?"


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


@dataclass(frozen=True)
class Upstream:
    """Where an engine is.

    `kind` is one of `ENGINES` or "auto". `experts_at` is the folder of the experts as the engine
    sees it, None where it is the same. The engine may take `wait` seconds to start.
    """

    url: str
    kind: str = AUTO
    key: str | None = field(default=None, repr=False)
    experts_at: str | None = None
    wait: float = 600.0

    def __post_init__(self) -> None:
        if "@" in self.url:
            raise ConfigError(
                f"--upstream must not hold a password; set {UPSTREAM_KEY} in the environment."
            )
        if not re.fullmatch(ADDRESS, self.url):
            raise ConfigError(
                f"--upstream is {shortened(self.url)}, but must be the address of an engine, such "
                f"as http://localhost:8000."
            )
        if self.kind not in (AUTO, *ENGINES):
            known = ", ".join((AUTO, *ENGINES))
            raise ConfigError(f"--upstream-kind is {shortened(self.kind)}; wanted one of {known}.")
        key = self.key or ""
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ConfigError(
                f"The key for the engine ({UPSTREAM_KEY}) has characters that no header can "
                f"carry, or a space around it."
            )

    @property
    def root(self) -> str:
        """The address without a slash, and without the "/v1" that OpenAI's clients want."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def served_models(places: Sequence[str], **options: Any) -> list[ServedModel]:
    """The models in `places`: "PLACE", "NAME=PLACE", or either with a pool's routing after it.

    A routing is written like the query of an address: "arrow=experts?router=arrow&k=3". It changes
    the routing in `options`, which hold for all models. Without NAME the model has its folder's or
    file's name, or what follows "hub:".
    """
    models = [_served(place, options) for place in places]
    for name, count in Counter(model.name for model in models).items():
        if not (name and name.isprintable()):
            raise ConfigError(
                f"A model can't be called {shortened(name)}; write NAME=PLACE with a printable "
                f"name."
            )
        if count > 1:
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
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        message = f"{written}: {query!r} is not a routing; write router=NAME&k=2."
        raise ConfigError(message) from error
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"{written}: a setting is given twice; once will do.")
    types = {setting.name: setting.type for setting in settings_of(Routing)}
    values = {name: read_text(value, types.get(name)) for name, value in pairs}
    return from_mapping(Routing, {**(asdict(common) if common else {}), **values}, written)


def _name_of(place: str) -> str:
    if place.startswith("hub:"):
        return place.removeprefix("hub:")
    path = Path(place)
    return (path.stem if path.suffix == ".json" else path.resolve().name) or place
