"""Uniform top-k: PHATGOOSE's experts with equal weights, which shows what the softmax is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.pool import Pool
from .phatgoose import Phatgoose
from .router import RouterSite, RoutingDecision, SiteRouter
from .vector_router import ScoredRouter


class UniformTopKRouter(ScoredRouter):
    """The same k experts as PHATGOOSE's, each with the weight 1/k."""

    one_call = False

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]."""
        decision = super().forward(u)
        return RoutingDecision(decision.experts, torch.full_like(decision.weights, 1 / self.k))


class UniformTopK(Phatgoose):
    """Router uniform-top-k."""

    def check(self, pool: Pool) -> None:
        """Raise as router phatgoose does, and ConfigError for another affinity than the paper's."""
        self.refuse_other_affinities("router uniform-top-k")
        super().check(pool)

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site."""
        return UniformTopKRouter(site.state["vectors"], self.routing.k, self.routing.eps)
