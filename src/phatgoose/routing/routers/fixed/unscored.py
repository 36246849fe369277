"""Routers that do not look at the token: the same weights for all, or chance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decision import RoutingDecision, highest

__all__ = ["RandomRouter", "UniformRouter"]


class UniformRouter(nn.Module):
    """All experts of the site with the weight 1 / pool size each, for every token.

    This is the exact mean of all updates B A (METHOD section 5, Merged Experts), not the mean of A
    times the mean of B. An expert that does not act at the site counts with an update of zero, so
    that weights sum to less than 1 there. A pool of one is that expert alone.
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


class RandomRouter(nn.Module):
    """k different experts drawn for each token, with equal weights: the floor of a comparison.

    Draws depend on `seed`, the site and how many tokens passed since `restart`.
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
