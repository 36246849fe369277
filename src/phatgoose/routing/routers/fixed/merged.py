"""Merged Experts: the mean of all experts' updates (Muqeeth et al. 2024, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decision import RoutingDecision
from ..router import Router, RouterSite, SiteRouter

__all__ = ["Merged", "UniformRouter"]


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
