"""The registry: every router as one record, from which help, tables, checks and files are derived.

A router is one file and one record (docs/extending.md): here, or registered by another package
under the entry points `phatgoose.routers`. Reading the records loads no torch.
"""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any, NamedTuple

from ...config import Settings, closest, from_mapping, read_text, settings_of
from ...errors import ConfigError
from ...files import add_entry_points, shortened
from . import configs

AUTO = "auto"  # no router: `automatic` puts the name of one in its place
WEIGHTS = "weights"  # the router whose mixture is the user's own
ENTRY_POINTS = "phatgoose.routers"


@dataclass(frozen=True)
class RouterSpec:
    """One router: its names, what it needs, its settings, and where its code is.

    `needs` are the attributes of every `Expert` that it can't do without (gates, means, readings,
    embeddings, lora), `given` what the user or an evaluation hands over (scores, expert, task,
    examples). `k` is its own number of experts, for each token or, if it is `per_input`, for each
    input; None if the user can't choose it. `config` is the class of its settings. A router that
    `grows` can take experts in, or leave some out, without being composed again. `home` is its
    `Router`: the class, or "module.Class", in this folder if `home` begins with a dot.
    """

    name: str
    label: str
    summary: str
    home: str | type[Any]
    needs: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    k: int | None = None
    config: type[Settings] = configs.NoSettings
    per_input: bool = False
    grows: bool = True

    @property
    def router(self) -> type[Any]:
        """The class of the router, a `router.Router`."""
        if isinstance(self.home, type):
            return self.home
        module, _, name = self.home.rpartition(".")
        found: type[Any] = getattr(importlib.import_module(module, __package__), name)
        return found


_OURS = (
    RouterSpec(
        "random",
        "Random",
        "k experts drawn for every token, with equal weights",
        ".fixed.Random",
        k=2,
        config=configs.Random,
    ),
    RouterSpec(
        "retrieval",
        "Retrieval",
        "per prompt, the expert with the nearest training input",
        ".retrieval.Retrieval",
        needs=("embeddings",),
        k=1,
        config=configs.Retrieval,
        per_input=True,
    ),
    RouterSpec(
        "centroid",
        "Centroid",
        "per prompt, the experts with the nearest mean of training inputs",
        ".centroid.Centroid",
        needs=("embeddings",),
        k=3,
        config=configs.Centroid,
        per_input=True,
    ),
    RouterSpec(
        "average-activation",
        "Average Activation",
        "the k experts with the mean training activation most like the token's",
        ".phatgoose.AverageActivation",
        needs=("means",),
        k=2,
        config=configs.Phatgoose,
    ),
    RouterSpec(
        "arrow",
        "Arrow",
        "the k experts that would stretch the token's activation most",
        ".arrow.Arrow",
        needs=("lora",),
        k=2,
        config=configs.Arrow,
    ),
    RouterSpec(
        "spectr",
        "SpectR",
        "the k experts with the largest projection of the token onto their LoRA's input space",
        ".spectr.Spectr",
        needs=("lora",),
        k=2,
        config=configs.Spectr,
    ),
    RouterSpec(
        "merged",
        "Merged Experts",
        "the mean of all experts' updates",
        ".fixed.Merged",
    ),
    RouterSpec(
        "phatgoose",
        "PHATGOOSE",
        "the k experts with the gates that best fit the token's activation",
        ".phatgoose.Phatgoose",
        needs=("gates",),
        k=2,
        config=configs.Phatgoose,
    ),
    RouterSpec(
        "discriminant",
        "Discriminant",
        "per prompt, the expert with the most similar training prompts, by hidden states",
        ".discriminant.Discriminant",
        needs=("readings",),
        k=1,
        config=configs.Discriminant,
        per_input=True,
    ),
    RouterSpec(
        "few-shot",
        "Few-shot",
        "for all prompts, the expert that best fits a few examples of the task",
        ".few_shot.FewShot",
        given=("examples",),
        grows=False,
        config=configs.FewShot,
    ),
    RouterSpec(
        "best-individual",
        "Best Individual",
        "the one expert with the best mean score over all tasks",
        ".fixed.BestIndividual",
        given=("scores",),
        grows=False,
    ),
    RouterSpec(
        "oracle",
        "Oracle",
        "for every task, the expert with the best score on it",
        ".fixed.Oracle",
        given=("scores", "task"),
        grows=False,
    ),
    RouterSpec(
        "single",
        "Single expert",
        "the one expert that the setting `expert` names",
        ".fixed.Single",
        given=("expert",),
        grows=False,
        config=configs.Single,
    ),
    RouterSpec(
        "weights",
        "Given weights",
        "your own mixture: experts and their weights",
        ".fixed.Weights",
        given=("weights",),
        grows=False,
        config=configs.Weights,
    ),
)


class _Registry(UserDict[str, RouterSpec]):
    """Our routers in the order of the tables, then those of other packages."""

    def __init__(self) -> None: ...

    @cached_property
    def data(self) -> dict[str, RouterSpec]:  # type: ignore[override]
        found: dict[str, Any] = {AUTO: None, **{spec.name: spec for spec in _OURS}}
        add_entry_points(ENTRY_POINTS, found, RouterSpec)
        del found[AUTO]  # a name that none may take
        return found


ROUTERS = _Registry()


class RouterChoice(NamedTuple):
    """A router's record, and its settings."""

    spec: RouterSpec
    config: Settings

    @property
    def text(self) -> str:
        """As the user writes it: settings that aren't the usual ones, in the order of the class."""
        if isinstance(self.config, configs.Weights):  # whose settings are names of experts
            return ":".join([self.spec.name, *filter(None, [self.config.mixture])])
        usual = self.spec.config()
        changed = [
            f"{setting.name}={written(value)}"
            for setting in settings_of(self.spec.config)
            if (value := getattr(self.config, setting.name)) != getattr(usual, setting.name)
        ]
        return ":".join([self.spec.name, *([",".join(changed)] if changed else [])])


def known_names() -> list[str]:
    """The names of all routers, without loading those of other packages."""
    others = {point.name for point in metadata.entry_points(group=ENTRY_POINTS)}
    return list(dict.fromkeys([*(spec.name for spec in _OURS), *sorted(others)]))


def spec_of(router: str) -> RouterSpec:
    """The record of a router, named with or without settings. Raises ConfigError without one."""
    name = router.partition(":")[0]
    if name in ROUTERS:
        return ROUTERS[name]
    for point in metadata.entry_points(group=ENTRY_POINTS, name=name):
        raise ConfigError(
            f"Router {name} can't be loaded from {point.value}, where "
            f"{point.dist.name if point.dist else 'another package'} registered it."
        )
    known = ", ".join((AUTO, *ROUTERS))
    hint = closest(name, (AUTO, *ROUTERS))
    raise ConfigError(f"router is {shortened(name)}, but must be one of {known}.{hint}")


def choice_of(router: str) -> RouterChoice:
    """The router and the settings that a text such as "arrow:form=peft" says.

    Raises ConfigError, in a line, for unknown routers and settings and for values that can't be.
    """
    name, _, rest = router.partition(":")
    if name == AUTO:
        raise ConfigError("Router auto has no settings of its own; name the router to set.")
    spec = spec_of(name)
    if spec.config is configs.Weights:
        return RouterChoice(spec, configs.Weights(written_mixture(read_mixture(rest)) or None))
    types = {setting.name: setting.type for setting in settings_of(spec.config)}
    values: dict[str, object] = {}
    for part in rest.split(",") if rest else ():
        key, sign, value = part.partition("=")
        if not sign or key in values:
            raise ConfigError(
                f"router is {shortened(router)}, but must be a name, or a name and settings, each "
                f"once: {name}:SETTING=VALUE,SETTING=VALUE."
            )
        values[key] = read_text(value, types.get(key))
    return RouterChoice(spec, from_mapping(spec.config, values, f"router {name}"))


MOST_WEIGHT = 100.0  # of one expert in a mixture, either way


def read_mixture(text: str) -> dict[str, float]:
    """The experts and weights of "NAME=WEIGHT,NAME=WEIGHT". Raises ConfigError."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, sign, value = part.partition("=")
        weight = read_text(value, float)
        if not sign or name in found or not isinstance(weight, float):
            raise ConfigError(
                f"weights are {shortened(text)}, but must be experts, each once, with numbers: "
                f"weights:NAME=WEIGHT,NAME=WEIGHT."
            )
        found[name] = weight
    return checked_mixture(found)


def checked_mixture(weights: Mapping[str, float]) -> dict[str, float]:
    """`weights` as plain numbers. Raises ConfigError for any that can't be weights."""
    if not isinstance(weights, Mapping):
        raise ConfigError(f"weights are {shortened(weights)}; wanted expert -> weight.")
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not isinstance(name, str) or not is_number or not abs(weight) <= MOST_WEIGHT:
            raise ConfigError(
                f"The weight of expert {shortened(name)} is {shortened(weight)}, but must be a "
                f"number from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}."
            )
    return {name: float(weight) for name, weight in weights.items()}


def written_mixture(weights: Mapping[str, float]) -> str:
    """`weights` as `read_mixture` reads them."""
    return ",".join(f"{name}={weight!r}" for name, weight in weights.items())


def written(value: object) -> str:
    """The `value` of a setting as `choice_of` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def split_routers(texts: Iterable[str]) -> list[str]:
    """The routers in texts that hold some, with commas between them and between their settings."""
    found: list[str] = []
    for text in texts:
        for part in filter(None, text.split(",")):
            name, sign, _ = part.partition("=")
            if sign and name.isidentifier() and found and ":" in found[-1]:
                found[-1] += f",{part}"
            else:
                found.append(part)
    return found
