"""A table of all routers, and lists of routers and mixtures as users write them. Loads no torch.

A router is one class (docs/extending.md): in a file of this folder and with a line in OURS, or in
another package that names it under the entry points `phatgoose.routers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import NamedTuple

from ...config import closest, read_pairs
from ...errors import ConfigError
from ...files import shortened

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
    "merged": Listed("fixed", "the mean of all experts' updates"),
    "phatgoose": Listed("phatgoose", "the gates that best fit the token's activation", "gates", 2),
    "discriminant": Listed(
        "discriminant", "per prompt, most similar hidden states", "prompt_statistics", 1
    ),
    "best-individual": Listed("fixed", "the expert with the best mean of --scores over all tasks"),
    "oracle": Listed("fixed", "for every task, the expert with the best of --scores on it"),
    "single": Listed("fixed", "the one expert that the setting `expert` names"),
    WEIGHTS: Listed("fixed", "your own mixture: experts and their weights"),
}


def known_names() -> list[str]:
    """The names of all routers, without loading those of other packages."""
    others = sorted(point.name for point in metadata.entry_points(group=ENTRY_POINTS))
    return list(dict.fromkeys([*OURS, *others]))


def check_known(router: str) -> None:
    """Raise ConfigError for a router, with or without settings, that no one has.

    Where other packages have routers, nothing is raised: the names of some show on import only.
    """
    known = [AUTO, *known_names()]
    if len(known) == len(OURS) + 1 and router.partition(":")[0] not in known:
        raise unknown(router, known)


def unknown(router: str, known: Sequence[str]) -> ConfigError:
    """What is told of a `router` that is none of the `known` ones."""
    return ConfigError(
        f"router is {shortened(router)}, but must be one of {', '.join(known)}."
        f"{closest(router.partition(':')[0], known)}"
    )


MOST_WEIGHT = 100.0  # of one expert in a mixture, either way


def read_mixture(text: str) -> dict[str, float]:
    """The experts and weights of "NAME=WEIGHT,NAME=WEIGHT". Raises ConfigError."""
    refusal = (
        f"weights are {shortened(text)}, but must be experts, each once, with numbers from "
        f"-{MOST_WEIGHT:g} to {MOST_WEIGHT:g}: weights:NAME=WEIGHT,NAME=WEIGHT."
    )
    weights: dict[str, float] = {}
    for name, value in read_pairs(text, refusal).items():
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not abs(weights[name]) <= MOST_WEIGHT:
            raise ConfigError(refusal)
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
            if sign and ":" not in name and routers and ":" in routers[-1]:
                routers[-1] += f",{part}"
            else:
                routers.append(part)
    return routers
