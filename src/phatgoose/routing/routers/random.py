"""Random: k experts drawn for every token, the floor of a comparison."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from .router import Router, RouterSite, RoutingDecision, SiteRouter, highest


class Random(Router):
    """Router random."""

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site, with a seed of its own."""
        seed = self.routing.router_seed + zlib.crc32(site.name.encode())
        return RandomRouter(len(site.experts), self.routing.k, seed)


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
