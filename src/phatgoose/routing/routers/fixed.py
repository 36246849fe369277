"""Routers that don't look at their input: merged, single, best-individual.

Merged Experts: the mean of all experts' updates (Muqeeth et al. 2024, section 4.2).
"""

from __future__ import annotations

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
)


class Merged(Router):
    """Router merged."""

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


# -------------------------------------------------------------------------------------------------
# Single: one expert, named by the user, for everything.
# -------------------------------------------------------------------------------------------------


class Single(Merged):
    """Router single: the mean of a pool that is narrowed to one expert."""

    folds = False

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        """The pool of the expert alone. Raises PoolError when it isn't named or isn't there."""
        name = self.routing.expert
        if name is None and len(pool) > 1:
            raise PoolError(
                f"Router single needs the name of its expert: one of {', '.join(pool.names)}."
            )
        return pool.select([name or pool.names[0]])


# -------------------------------------------------------------------------------------------------
# Best Individual: the expert with the best mean score over all tasks, for everything.
#
# Muqeeth et al. 2024, section 4.2. It knows the tasks' answers beforehand: not zero-shot.
# -------------------------------------------------------------------------------------------------


class BestIndividual(Merged):
    """Router best-individual: the mean of a pool that is narrowed to one expert."""

    folds = False

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        """The pool of the best expert alone. Raises ConfigError without `scores`."""
        return pool.select([best_expert(given_scores(scores, self.routing), pool.names)])
