"""The names of all routers, and routers made of what a user writes. Loads no torch by itself.

A router is one class (docs/extending.md): in a file of this folder and with a line in OURS, or in
another package that names it under the entry points `phatgoose.routers`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from ...config import Routing, closest
from ...errors import ConfigError
from ...files import add_entry_points, shortened

if TYPE_CHECKING:
    from .router import Router

AUTO = "auto"  # no router: `auto` puts the name of one in its place
WEIGHTS = "weights"  # the router whose mixture is the user's own
ENTRY_POINTS = "phatgoose.routers"


class Listed(NamedTuple):
    """What a list of routers shows: `needs` and `k` are those of the class at `place`."""

    place: str  # its file in this folder
    summary: str
    needed: str = ""  # in words with spaces between
    k: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.needed.split())


OURS: Mapping[str, Listed] = {  # in the order of the tables
    "random": Listed("fixed", "k experts drawn for every token, with equal weights", k=2),
    "retrieval": Listed("retrieval", "per prompt, the nearest training input", "embeddings", 1),
    "centroid": Listed("retrieval", "per prompt, the nearest means of inputs", "embeddings", 3),
    "average-activation": Listed("phatgoose", "the most similar mean activations", "means", 2),
    "arrow": Listed("arrow", "the LoRAs that would stretch the token's activation most", "lora", 2),
    "spectr": Listed("spectr", "the LoRAs whose input space has most of the token", "lora", 2),
    "merged": Listed("fixed", "the mean of all experts' updates"),
    "phatgoose": Listed("phatgoose", "the gates that best fit the token's activation", "gates", 2),
    "discriminant": Listed("discriminant", "per prompt, most similar hidden states", "readings", 1),
    "few-shot": Listed("few_shot", "for all prompts, what best fits a few examples of the task"),
    "best-individual": Listed("fixed", "the expert with the best mean of --scores over all tasks"),
    "oracle": Listed("fixed", "for every task, the expert with the best of --scores on it"),
    "single": Listed("fixed", "the one expert that the setting `expert` names"),
    WEIGHTS: Listed("fixed", "your own mixture: experts and their weights"),
}


def known_names() -> list[str]:
    """The names of all routers, without loading those of other packages."""
    others = sorted(point.name for point in metadata.entry_points(group=ENTRY_POINTS))
    return list(dict.fromkeys([*OURS, *others]))


def all_routers() -> dict[str, type[Router]]:
    """The classes of all routers by name, ours first. What can't be loaded is a warning."""
    from .router import Router

    known: dict[str, type] = {AUTO: Router, **{name: class_of(name) for name in OURS}}
    add_entry_points(ENTRY_POINTS, known, type)
    known = {**known, **Router.defined, **known}
    return {name: kind for name, kind in known.items() if issubclass(kind, Router) and kind.name}


def listing() -> dict[str, Listed]:
    """What a list of routers shows; those of other packages alone are imported for it."""
    if not metadata.entry_points(group=ENTRY_POINTS):
        return dict(OURS)
    return {
        name: OURS.get(name) or Listed("", kind.summary(), " ".join(kind.needs), kind.usual_k)
        for name, kind in all_routers().items()
    }


def class_of(router: str) -> type[Router]:
    """The class of a router, named with or without settings. Raises ConfigError without one."""
    name = router.partition(":")[0]
    if name in OURS:
        inside = vars(importlib.import_module(f".{OURS[name].place}", __package__)).values()
        ours: type[Router] = next(each for each in inside if getattr(each, "name", None) == name)
        return ours
    others = all_routers()
    if name in others:
        return others[name]
    known = (AUTO, *others)
    raise ConfigError(
        f"router is {shortened(router)}, but must be one of {', '.join(known)}."
        f"{closest(name, known)}"
    )


def router_of(routing: Routing) -> Router:
    """The router that `routing` asks for, such as "arrow:form=peft".

    Raises ConfigError, in a line, for unknown routers and settings and for values that can't be.
    """
    _, _, rest = routing.router.partition(":")
    router = class_of(routing.router).read(rest)
    k, kernel, embedder = routing.k or 0, routing.kernel, routing.embedder
    return replace(router, k=k, kernel=kernel, embedder=embedder)


def canonical(router: str) -> str:
    """`router` with settings that aren't the usual ones, in the order of its class."""
    return router_of(Routing(router)).text


MOST_WEIGHT = 100.0  # of one expert in a mixture, either way


def read_mixture(text: str) -> dict[str, float]:
    """The experts and weights of "NAME=WEIGHT,NAME=WEIGHT". Raises ConfigError."""
    weights: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, sign, value = part.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not sign or name in weights or not abs(weight) <= MOST_WEIGHT:
            raise ConfigError(
                f"weights are {shortened(text)}, but must be experts, each once, with numbers from "
                f"-{MOST_WEIGHT:g} to {MOST_WEIGHT:g}: weights:NAME=WEIGHT,NAME=WEIGHT."
            )
        weights[name] = weight
    return weights


def written_mixture(weights: Mapping[str, float]) -> str:
    """`weights` as `read_mixture` reads them."""
    return ",".join(f"{name}={float(weight)!r}" for name, weight in weights.items())


def split_routers(texts: Iterable[str]) -> list[str]:
    """The routers in texts that hold some, with commas between them and between their settings."""
    routers: list[str] = []
    for text in texts:
        for part in filter(None, text.split(",")):
            name, sign, _ = part.partition("=")
            if sign and name.isidentifier() and routers and ":" in routers[-1]:
                routers[-1] += f",{part}"
            else:
                routers.append(part)
    return routers
