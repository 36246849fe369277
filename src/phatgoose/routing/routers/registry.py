"""The registry: every router as one record, from which help, tables, checks and files are derived.

A router is one file and one record here (docs/extending.md). Reading the records loads no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...config import Routing, settings_of
from ...errors import ConfigError
from ...files.strict import shortened

AUTO = "auto"  # no router: `automatic` puts the name of one in its place
USED_BY_ALL = ("router", "expert", "kernel", "retrieval_embedder")  # or refused elsewhere


@dataclass(frozen=True)
class RouterSpec:
    """One router: its names, what it needs, and where its code is.

    `needs` are the attributes of every `Expert` that it can't do without (gates, means, readings,
    embeddings, lora), `given` what the user or an evaluation hands over (scores, expert, task),
    `settings` the fields of `Routing` that its results depend on. A router that `grows` can take
    experts in, or leave some out, without being composed anew. One that chooses for whole inputs
    has its own `input_k` and `input_temperature`, for settings of these names that are None. `home`
    is its `Router`: the class, or "module.Class" in this folder.
    """

    name: str
    label: str
    summary: str
    home: str | type[Any]
    needs: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    grows: bool = True
    input_k: int = 1
    input_temperature: float = 1.0

    @property
    def uses_k(self) -> bool:
        """True where the user says how many experts a token gets."""
        return "k" in self.settings

    def unused(self, given: Collection[str]) -> tuple[str, ...]:
        """The names of those `given` settings of a routing that it doesn't look at, in order."""
        used = {*self.settings, *USED_BY_ALL}
        names = (setting.name for setting in settings_of(Routing))
        return tuple(name for name in names if name in given and name not in used)

    @property
    def router(self) -> type[Any]:
        """The class of the router, a `router.Router`."""
        if isinstance(self.home, type):
            return self.home
        module, _, name = self.home.rpartition(".")
        found: type[Any] = getattr(importlib.import_module(f"..{module}", __name__), name)
        return found


INPUT = ("input_k", "input_temperature")  # settings of those that choose for whole inputs
READING = ("reading_place", "reading_from", "reading_to", "shrinkage", "task_variance")

_ALL = (
    RouterSpec(
        "random",
        "Random",
        "k experts drawn for every token, with equal weights",
        "random.Random",
        settings=("k", "router_seed"),
    ),
    RouterSpec(
        "retrieval",
        "Retrieval",
        "for every input the expert of the nearest training input",
        "retrieval.Retrieval",
        needs=("embeddings",),
        settings=("retrieval_form", *INPUT),
        input_temperature=0.2,
    ),
    RouterSpec(
        "centroid",
        "Centroid",
        "for every input the experts whose mean training input is nearest",
        "centroid.Centroid",
        needs=("embeddings",),
        settings=INPUT,
        input_k=3,
        input_temperature=0.2,
    ),
    RouterSpec(
        "average-activation",
        "Average Activation",
        "the k experts whose mean training activation is most like the token's",
        "average_activation.AverageActivation",
        needs=("means",),
        settings=("k", "eps", "affinity", "router_temperature"),
    ),
    RouterSpec(
        "arrow",
        "Arrow",
        "the k experts that would stretch the token's activation most",
        "arrow.Arrow",
        needs=("lora",),
        settings=("k", "arrow", "router_temperature"),
    ),
    RouterSpec(
        "spectr",
        "SpectR",
        "the k experts whose updates look at most of the token's activation",
        "spectr.Spectr",
        needs=("lora",),
        settings=("k", "spectr_shortlist"),
    ),
    RouterSpec(
        "merged",
        "Merged Experts",
        "the mean of all experts' updates",
        "fixed.Merged",
    ),
    RouterSpec(
        "uniform-top-k",
        "Uniform top-k",
        "PHATGOOSE's k experts with equal weights",
        "uniform_top_k.UniformTopK",
        needs=("gates",),
        settings=("k", "eps", "stand_in"),
    ),
    RouterSpec(
        "phatgoose",
        "PHATGOOSE",
        "the k experts whose gates the token's activation fits best",
        "phatgoose.Phatgoose",
        needs=("gates",),
        settings=("k", "eps", "stand_in", "affinity", "router_temperature"),
    ),
    RouterSpec(
        "glider",
        "GLIDER",
        "PHATGOOSE's scores, and how near the whole input is to each expert's training inputs",
        "glider.Glider",
        needs=("gates", "embeddings"),
        settings=("k", "eps", "router_temperature", "glider_lambda"),
    ),
    RouterSpec(
        "logo",
        "LoGo",
        "for every input the experts whose updates of one layer are longest at the prompt's end",
        "logo.Logo",
        needs=("lora",),
        settings=("input_k", "logo_reads"),
        input_k=20,
    ),
    RouterSpec(
        "discriminant",
        "Discriminant",
        "for every input the expert whose training prompts the base reads most like it",
        "discriminant.Discriminant",
        needs=("readings",),
        settings=(*READING, *INPUT),
        input_temperature=0.1,
    ),
    RouterSpec(
        "joint-discriminant",
        "Joint Discriminant",
        "for every input the experts whose training prompts base and embedder read most like it",
        "joint_discriminant.JointDiscriminant",
        needs=("readings", "embeddings"),
        settings=(*READING, "embedding_share", *INPUT),
        input_k=3,
        input_temperature=0.05,
    ),
    RouterSpec(
        "discriminant-phatgoose",
        "Discriminant + PHATGOOSE",
        "the k experts whose gates fit best, of those that discriminant shortlists for the input",
        "shortlisted.ByDiscriminant",
        needs=("gates", "readings"),
        settings=("k", "eps", "affinity", "router_temperature", "prior", *READING, *INPUT),
        input_k=5,
        input_temperature=0.1,
    ),
    RouterSpec(
        "best-individual",
        "Best Individual",
        "the one expert with the best mean score over all tasks",
        "fixed.BestIndividual",
        given=("scores",),
        grows=False,
    ),
    RouterSpec(
        "oracle",
        "Oracle",
        "for every task the expert with the best score on it",
        "oracle.Oracle",
        given=("scores", "task"),
        grows=False,
    ),
    RouterSpec(
        "single",
        "Single expert",
        "the one expert that `expert` names",
        "fixed.Single",
        given=("expert",),
        grows=False,
    ),
)
ROUTERS = {spec.name: spec for spec in _ALL}  # in the order of the tables


def spec_of(name: str) -> RouterSpec:
    """The record of the router `name`. Raises ConfigError when there is none."""
    if name not in ROUTERS:
        known = ", ".join((AUTO, *ROUTERS))
        raise ConfigError(f"router is {shortened(name)}, but must be one of {known}.")
    return ROUTERS[name]
