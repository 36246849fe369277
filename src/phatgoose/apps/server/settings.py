"""What a server serves, and the engine behind it, as an operator writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ...config import Routing, from_mapping
from ...errors import ConfigError
from ...files import shortened
from ...tasks.task import refuse_twice

API_KEYS = "PHATGOOSE_API_KEYS"  # the environment's keys, separated by commas
UPSTREAM_KEY = "PHATGOOSE_UPSTREAM_KEY"  # the environment's key for the engine
ADDRESS = r"(?i:https?)://([\w.-]+|\[[\w:.%]+\])(:[0-6]?\d{1,4})?(/[!->@-~]*)?"
KEY = r"[!-~]*"
EXPERT_PLACE = "{expert}"  # in what an engine calls an expert
BASE_PLACE = "{base}"


@dataclass(frozen=True)
class ServedModel:
    """A model to serve as `name`: a routed model's folder, a pool composed by `routing`, a base.

    `keep`, `leave_out` and `scores` are those of `compose`; None means the model's own. With
    `only_better` the base answers prompts of experts that are no better by their own record.
    """

    name: str
    place: str
    routing: Routing = Routing()  # noqa: RUF009  frozen
    keep: tuple[str, ...] | None = None
    leave_out: tuple[str, ...] = ()
    base: str | None = None
    dtype: str = "auto"
    scores: str | None = None
    only_better: bool = False


@dataclass(frozen=True)
class Upstream:
    """The address of an engine, and its key.

    `model_name` is what an engine that is neither vLLM nor llama.cpp calls an expert, such as
    "{base}:{expert}". `default` is the model that engines are asked for no expert, None the first
    one's base. `base` is the experts' base that the engine has, None the one that it says itself.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    model_name: str | None = None
    default: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if not (re.fullmatch(ADDRESS, self.url) and re.fullmatch(KEY, self.key or "")):
            raise ConfigError(
                f"--upstream must be the address of an engine, such as http://localhost:8000, "
                f"without a password, and its key ({UPSTREAM_KEY} in the environment) visible "
                f"characters."
            )
        if self.model_name is None:
            return
        rest = self.model_name.replace(BASE_PLACE, "").replace(EXPERT_PLACE, "", 1)
        if EXPERT_PLACE not in self.model_name or "{" in rest or "}" in rest:
            raise ConfigError(
                f"--model-name is {shortened(self.model_name)}, but must have {EXPERT_PLACE} once, "
                f"and may have {BASE_PLACE}, as in '{BASE_PLACE}:{EXPERT_PLACE}'."
            )

    @classmethod
    def of(
        cls, written: str, key: str | None, model_name: str | None, default: str | None
    ) -> Upstream:
        """The engine of an operator's "ADDRESS" or "BASE=ADDRESS"."""
        base, _, url = written.partition("=http")
        if written.startswith("http") or not url:
            return cls(written, key, model_name, default)
        return cls(f"http{url}", key, model_name, default, base)

    @property
    def root(self) -> str:
        """The address without a slash, and without the "/v1" that OpenAI's clients want."""
        return self.url.rstrip("/").removesuffix("/v1")


def served_models(places: Sequence[str], **options: Any) -> list[ServedModel]:
    """The models in `places`: "PLACE", "NAME=PLACE", or either with a pool's routing after it.

    A routing is written like the query of an address: "arrow=experts?router=arrow&k=3". It changes
    the routing in `options`, which hold for all models. Without NAME the model has its folder's or
    file's name, or what follows "hub:".
    """
    models = [_served(place, options) for place in places]
    names = (model.name for model in models)
    refuse_twice("models", names, ConfigError, "write NAME=PLACE for one of them")
    return models


def keys_of(listed: str | None) -> tuple[str, ...]:
    """The API keys in a list separated by commas."""
    return tuple(key.strip() for key in (listed or "").split(",") if key.strip())


def _served(written: str, options: Mapping[str, Any]) -> ServedModel:
    if Path(written).exists():  # whatever characters its name has
        return ServedModel(_name_of(written), written, **options)
    before, _, query = written.partition("?")
    name, _, place = before.partition("=")
    if not (name and place):
        name = _name_of(before)
        place = before
    common = asdict(options.get("routing", Routing()))
    changes = dict(parse_qsl(query, keep_blank_values=True))
    routing = from_mapping(Routing, common | changes, written)
    return ServedModel(name, place, **{**options, "routing": routing})


def _name_of(place: str) -> str:
    if place.startswith("hub:"):
        return place.removeprefix("hub:")
    return Path(place).resolve().name or place
