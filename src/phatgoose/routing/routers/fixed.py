"""Routers that don't look at their input: random, merged, single, weights, and by scores."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import closest
from ...errors import PoolError, RoutingError
from ...experts.pool import Pool
from ...files import one_line
from ..choices import NOBODY, Choice
from .prompt_router import ByPrompt, Prompt, PromptRouter, Tables
from .registry import read_mixture
from .router import (
    Router,
    RouterSite,
    RoutingDecision,
    Scores,
    SiteRouter,
    best_expert,
    best_expert_by_task,
    equal_shares,
    given_scores,
    highest,
    highest_active,
)


class Random(Router):
    """Router random: the floor of a comparison."""

    def at(self, site: RouterSite) -> SiteRouter:
        seed = self.config.seed + zlib.crc32(site.name.encode())
        return RandomRouter(len(site.experts), self.k, seed)


class RandomRouter(SiteRouter):
    """k different experts drawn for each token, with equal weights.

    Draws depend on `seed` and how many tokens passed since `restart`.
    """

    def __init__(self, experts: int, k: int, seed: int) -> None:
        super().__init__()
        self.experts, self.k, self.seed = experts, min(k, experts), seed
        self.restart()

    def restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def forward(self, u: Tensor) -> RoutingDecision:
        lots = torch.rand(len(u), self.experts, generator=self._generator)
        experts = highest(lots, self.k).to(u.device)
        return RoutingDecision(experts, torch.full(experts.shape, 1 / self.k, device=u.device))

    def among(self, u: Tensor, active: Tensor) -> RoutingDecision:
        lots = torch.rand(len(u), self.experts, generator=self._generator).to(u.device)
        experts, acts = highest_active(lots, self.k, active)
        return RoutingDecision(experts, equal_shares(acts))

    def distribution(self, u: Tensor) -> Tensor:
        return torch.full((len(u), self.experts), 1 / self.experts, device=u.device)


class Merged(Router):
    """Router merged (Muqeeth et al. 2024, section 4.2)."""

    folds = True

    def at(self, site: RouterSite) -> SiteRouter:
        return UniformRouter(len(site.experts), site.pool_size)


class UniformRouter(SiteRouter):
    """All experts of the site with the weight 1 / pool size each, for every token.

    The exact mean of all updates B A. An expert that does not act at the site counts with zero, so
    that weights sum to less than 1 there. A pool of one is that expert alone.
    """

    def __init__(self, experts: int, pool_size: int) -> None:
        super().__init__()
        self.experts, self.weight = experts, 1 / pool_size

    def forward(self, u: Tensor) -> RoutingDecision:
        experts = torch.arange(self.experts, device=u.device).expand(len(u), -1)
        return RoutingDecision(experts, torch.full(experts.shape, self.weight, device=u.device))

    def sums(self, u: Tensor) -> Tensor:
        return u.new_zeros(len(u), 1, dtype=torch.float64)  # nothing: it doesn't look

    def decide(self, sums: Tensor, n: int) -> RoutingDecision:
        return self.forward(sums)

    def distribution(self, u: Tensor) -> Tensor:
        return torch.full((len(u), self.experts), self.weight, device=u.device)


class Single(Merged):
    """Router single: the expert that the user names, as a pool of one."""

    folds = False

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        name = self.config.expert
        if name is None and len(pool) > 1:
            raise PoolError(
                f"Router single needs the name of its expert (single:expert=NAME): one of "
                f"{', '.join(pool.names)}."
            )
        return pool.select([name or pool.names[0]])


class BestIndividual(Merged):
    """Router best-individual (paper section 4.2): the expert with the best mean over all tasks.

    It knows the tasks' answers beforehand: not zero-shot.
    """

    folds = False

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        return pool.select([best_expert(given_scores(scores, self.routing), pool.names)])


class Oracle(ByPrompt):
    """Router oracle (paper section 4.2): for every task the expert with the best score on it.

    It knows the tasks' answers beforehand: not zero-shot.
    """

    unserved = "Router oracle goes by the task's name, which evaluate and compare tell it."

    def tables(
        self, pool: Pool, scores: Scores | None = None, embedder: str | None = None
    ) -> Tables:
        best = best_expert_by_task(given_scores(scores, self.routing), pool.names)
        chosen = {task: pool.names.index(expert) for task, expert in best.items()}
        return Tables(pool.names, info={"experts_by_task": chosen})

    def chooser(self, tables: Tables) -> PromptRouter:
        if "experts_by_task" not in tables.info:
            raise RoutingError("Router oracle needs lookup.experts_by_task in routed.json.")
        return ByTask(tables)


class ByTask(PromptRouter):
    name = "oracle"

    def choose(
        self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None, **known: Any
    ) -> Choice:
        task, best = known.get("task"), dict[str, int](self.tables.info["experts_by_task"])
        if task is None:
            raise RoutingError(str(self.unserved))
        if task not in best:
            tasks = one_line(", ".join(sorted(best)))
            raise RoutingError(
                f"Router oracle has no scores for task {task!r}; it has them for {tasks}."
            )
        return Choice.alone(torch.full((len(prompts),), best[task]))


class Weights(ByPrompt):
    """Router weights: a mixture that the user names; a server's requests may each have their own.

    LoRAuter and others (arXiv 2601.21795) compose such mixtures by hand; here it is the sum of
    w_z B_z A_z, whatever the weights sum to.
    """

    @cached_property
    def weights(self) -> dict[str, float]:
        return read_mixture(self.config.mixture or "")

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        if not self.weights:
            return pool
        return pool.select(self.weights)

    def chooser(self, tables: Tables) -> PromptRouter:
        return GivenWeights(tables, self.weights)

    def for_model(self, tables: Tables, tokenizer: PreTrainedTokenizerBase | None) -> PromptRouter:
        return self.prompt_router(tables, tokenizer)  # no prompt is read


class GivenWeights(PromptRouter):
    """The same `weights`, by name, for every prompt."""

    name = "weights"

    def __init__(self, tables: Tables, weights: Mapping[str, float]) -> None:
        super().__init__(tables)
        self.weights = weights

    def choose(
        self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None, **known: Any
    ) -> Choice:
        if not self.weights:
            raise RoutingError(
                "Router weights needs the experts and their weights: weights:NAME=WEIGHT,…, or a "
                "request's own."
            )
        return mixture_of(self.weights, self.experts).repeated(len(prompts))


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
    held = sorted((pair for pair in weights.items() if pair[1]), key=lambda pair: -abs(pair[1]))
    if not held:
        return Choice(torch.tensor([[NOBODY]]), torch.zeros(1, 1))
    experts = torch.tensor([[names.index(name) for name, _ in held]])
    return Choice(experts, torch.tensor([[weight for _, weight in held]]))
