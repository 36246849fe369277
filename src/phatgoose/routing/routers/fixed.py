"""Routers that don't look at their input: random, merged, single, weights, and by scores."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

import torch
from torch import Tensor

from ...config import SEED, closest
from ...errors import ConfigError, PoolError, RoutingError
from ...experts.pool import Pool
from ...files import one_line, read_json
from ..choice import NOBODY, Choice
from .prompt import ByPrompt, Known, PromptChooser, Prompts, Tables
from .registry import WEIGHTS, read_mixture, written_mixture
from .router import Router, RouterAtSite, Scores

NO_SCORES = " Wanted the comparison.json of a 'phatgoose compare' that ran every single expert."


@dataclass(frozen=True)
class Random(Router):
    """Router random, the floor of a comparison: k different experts drawn for each token.

    Draws depend on `seed`, the site, and how many tokens passed since `restart`.
    """

    name = "random"
    label = "Random"
    usual_k = 2
    equal = True
    by_token = False

    seed: Annotated[int, "Seed of the draws.", SEED] = 0

    def restart(self, at_site: RouterAtSite) -> None:
        seed = self.seed + zlib.crc32(at_site.place.encode())
        at_site.generator = torch.Generator().manual_seed(seed)

    def scores(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        return torch.rand(len(u), at_site.E, generator=at_site.generator).to(u.device)

    def distribution(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        return torch.full((len(u), at_site.E), 1 / at_site.E, device=u.device)


@dataclass(frozen=True)
class Merged(Router):
    """Router merged (Muqeeth et al. 2024, section 4.2): the exact mean of all updates B A.

    All experts of a site have the weight 1 / pool size there. An expert that does not act at the
    site counts with zero, so that weights sum to less than 1. A pool of one is that expert alone.
    """

    name = "merged"
    label = "Merged Experts"
    folds = True

    def constant(self, at_site: RouterAtSite) -> Tensor:
        return torch.full((at_site.E,), 1 / at_site.pool_size, device=at_site.members.device)


@dataclass(frozen=True)
class Single(Merged):
    """Router single: the expert that the user names, as a pool of one."""

    name = "single"
    label = "Single expert"
    given = ("expert",)
    folds = grows = False

    expert: Annotated[str | None, "The expert's name; a pool of one needs none."] = None

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        if self.expert is None and len(pool) > 1:
            raise PoolError(
                f"Router single needs the name of its expert (single:expert=NAME): one of "
                f"{', '.join(pool.names)}."
            )
        return pool.select([self.expert or pool.names[0]])


@dataclass(frozen=True)
class BestIndividual(Merged):
    """Router best-individual (paper section 4.2): the expert with the best mean over all tasks.

    It knows the tasks' answers beforehand: not zero-shot.
    """

    name = "best-individual"
    label = "Best Individual"
    given = ("scores",)
    folds = grows = False

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        return pool.select([best_expert(needed(scores, self.name), pool.names)])


@dataclass(frozen=True)
class Oracle(ByPrompt):
    """Router oracle (paper section 4.2): for every task the expert with the best score on it.

    It knows the tasks' answers beforehand: not zero-shot.
    """

    name = "oracle"
    label = "Oracle"
    given = ("scores", "task")
    grows = per_input = False
    unserved = "Router oracle goes by the task's name, which evaluate and compare tell it."

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        best = best_expert_by_task(needed(scores, self.name), pool.names)
        chosen = {task: pool.names.index(expert) for task, expert in best.items()}
        return Tables(pool.names, info={"experts_by_task": chosen})

    def ready(self, tables: Tables) -> dict[str, int]:
        return dict(tables.info.get("experts_by_task", {}))

    def choose(self, chooser: PromptChooser, prompts: Prompts, known: Known) -> Choice:
        task = known.get("task")
        best = chooser.ready
        if task is None:
            raise RoutingError(self.unserved)
        if task not in best:
            tasks = one_line(", ".join(sorted(best)))
            raise RoutingError(
                f"Router oracle has no scores for task {task!r}; it has them for {tasks}."
            )
        return Choice.alone(torch.full((len(prompts),), best[task]))


def needed(scores: Scores | None, router: str) -> Scores:
    """`scores`; ConfigError without any."""
    if scores is None:
        raise ConfigError(
            f"Router {router} needs the scores of every single expert: those of a finished "
            f"'phatgoose compare' (--scores comparison.json)."
        )
    return scores


@dataclass(frozen=True)
class Comparison:
    """What is read of a comparison.json."""

    experts: dict[str, dict[str, float]]


def read_scores(path: str | Path) -> Scores:
    """Single experts' scores of a comparison.json. Raises PoolError."""
    return read_json(Path(path), Comparison, PoolError, NO_SCORES).experts


def best_expert(scores: Scores, names: Sequence[str]) -> str:
    """The one of `names` with the best mean over all tasks; PoolError where scores are missing."""
    tasks = _common_tasks(scores, names)
    return max(names, key=lambda name: sum(scores[name][task] for task in tasks))


def best_expert_by_task(scores: Scores, names: Sequence[str]) -> dict[str, str]:
    """For each task the best one of `names`; PoolError where scores are missing."""
    tasks = _common_tasks(scores, names)
    return {task: max(names, key=lambda name: scores[name][task]) for task in tasks}


def _common_tasks(scores: Scores, names: Sequence[str]) -> list[str]:
    tasks = list(scores.get(names[0], ()))
    for name in names:
        if not tasks or set(scores.get(name, ())) != set(tasks):
            raise PoolError(
                f"Expert {name!r} lacks scores, or was scored on other tasks than {names[0]!r}; "
                f"scores are of {', '.join(scores)}."
            )
    return tasks


@dataclass(frozen=True)
class Weights(ByPrompt):
    """Router weights: a mixture that the user names; a server's requests may each have their own.

    LoRAuter and others (arXiv 2601.21795) compose such mixtures by hand; here it is the sum of
    w_z B_z A_z, whatever the weights sum to. Its settings are names of experts:
    weights:reviews=0.7,trivia=0.3.
    """

    name = WEIGHTS
    label = "Given weights"
    given = ("weights",)
    grows = per_input = False

    mixture: Annotated[
        str | None,
        "Each expert and its weight, NAME=WEIGHT; requests to a server may bring their own.",
    ] = None

    @classmethod
    def read(cls, text: str) -> Self:
        return cls(mixture=written_mixture(read_mixture(text)) or None)

    @property
    def text(self) -> str:
        return f"{self.name}:{self.mixture}" if self.mixture else self.name

    @cached_property
    def weights(self) -> dict[str, float]:
        return read_mixture(self.mixture or "")

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        return pool.select(self.weights) if self.weights else pool

    def constant(self, at_site: RouterAtSite) -> Tensor | None:
        if not self.weights:
            return None
        names = [at_site.names[z] for z in at_site.members.tolist()]
        return torch.tensor([self.weights.get(name, 0.0) for name in names])

    def choose(self, chooser: PromptChooser, prompts: Prompts, known: Known) -> Choice:
        if not self.weights:
            raise RoutingError(
                "Router weights needs the experts and their weights: weights:NAME=WEIGHT,…, or a "
                "request's own."
            )
        return mixture_of(self.weights, chooser.experts).repeated(len(prompts))


def mixture_of(weights: Mapping[str, float], names: Sequence[str]) -> Choice:
    """`weights`, by name, as the choice for one row, heaviest first.

    `names` are the pool's. No expert, or weights of 0 alone, are the base. Raises PoolError for an
    unknown name.
    """
    for name in weights:
        if name not in names:
            raise PoolError(
                f"The pool has no expert {one_line(name, 80)!r}; it has {', '.join(names)}."
                f"{closest(name[:80], names)}"
            )
    acting = [name for name, weight in weights.items() if weight]
    if not acting:
        return Choice(torch.tensor([[NOBODY]]), torch.zeros(1, 1))
    acting.sort(key=lambda name: -abs(weights[name]))
    experts = torch.tensor([list(map(names.index, acting))])
    return Choice(experts, torch.tensor([[weights[name] for name in acting]]))
