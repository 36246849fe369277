"""Routers that don't look at their input: random, merged, single, best-individual."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ...errors import PoolError
from ...experts.pool import Pool
from .router import (
    Router,
    RouterSite,
    RoutingDecision,
    Scores,
    SiteRouter,
    best_expert,
    given_scores,
    highest,
)


class Random(Router):
    """Router random: the floor of a comparison."""

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site, with a seed of its own."""
        seed = self.config.seed + zlib.crc32(site.name.encode())
        return RandomRouter(len(site.experts), self.k, seed)


class RandomRouter(SiteRouter):
    """k different experts drawn for each token, with equal weights.

    Draws depend on `seed` and how many tokens passed since `restart`.
    """

    def __init__(self, experts: int, k: int, seed: int) -> None:
        """`experts` act at the site; `k` is lowered to them; give each site its own `seed`."""
        super().__init__()
        self.experts, self.k, self.seed = experts, min(k, experts), seed
        self.restart()

    def restart(self) -> None:
        """Draw the same experts again from here on."""
        self._generator = torch.Generator().manual_seed(self.seed)

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]."""
        lots = torch.rand(len(u), self.experts, generator=self._generator)
        experts = highest(lots, self.k).to(u.device)
        return RoutingDecision(experts, torch.full(experts.shape, 1 / self.k, device=u.device))

    def distribution(self, u: Tensor) -> Tensor:
        """The chance of each expert to be drawn, 1/E, [T, E]; nothing is drawn."""
        return torch.full((len(u), self.experts), 1 / self.experts, device=u.device)


class Merged(Router):
    """Router merged (Muqeeth et al. 2024, section 4.2)."""

    folds = True

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site."""
        return UniformRouter(len(site.experts), site.pool_size)


class UniformRouter(SiteRouter):
    """All experts of the site with the weight 1 / pool size each, for every token.

    This is the exact mean of all updates B A, not the mean of A times the mean of B. An expert that
    does not act at the site counts with an update of zero, so that weights sum to less than 1
    there. A pool of one is that expert alone.
    """

    def __init__(self, experts: int, pool_size: int) -> None:
        """`experts` of a pool act at the site."""
        super().__init__()
        self.experts, self.weight = experts, 1 / pool_size

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]; k is E."""
        experts = torch.arange(self.experts, device=u.device).expand(len(u), -1)
        return RoutingDecision(experts, torch.full(experts.shape, self.weight, device=u.device))

    def distribution(self, u: Tensor) -> Tensor:
        """The weights themselves, [T, E]."""
        return torch.full((len(u), self.experts), self.weight, device=u.device)


class Single(Merged):
    """Router single: the expert that the user names, as a pool of one."""

    folds = False

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        """The pool of the expert alone. Raises PoolError when it isn't named or isn't there."""
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
        """The pool of the best expert alone. Raises ConfigError without `scores`."""
        return pool.select([best_expert(given_scores(scores, self.routing), pool.names)])
