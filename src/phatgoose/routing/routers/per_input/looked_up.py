"""The frame of routers that choose one expert for a whole input."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....errors import ConfigError, RoutingError
from ..decision import RoutingDecision
from ..lookup import Lookup
from ..router import Router, RouterSite, SiteRouter

__all__ = ["NOBODY", "LookedUp", "LookedUpRouter"]

NOBODY = -1  # stands in rows for no expert: the base's own output


class LookedUp(Router):
    """The frame of routers that choose one expert for a whole input."""

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site."""
        if site.lookup is None:
            raise RoutingError(f"Router {self.spec.name} has nothing to look experts up in.")
        return LookedUpRouter(site.experts, site.pool_size, site.lookup)

    def needed(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """`tokenizer`, which reads prompts. Raises ConfigError when there is none."""
        if tokenizer is None:
            raise ConfigError(
                f"Router {self.spec.name} reads prompts; hand the base over with its tokenizer."
            )
        return tokenizer


class LookedUpRouter(SiteRouter):
    """At one site: the expert that the shared `Lookup` holds for each row, alone."""

    position: Tensor

    def __init__(self, experts: Tensor, pool_size: int, lookup: Lookup) -> None:
        """`experts` [E] are the pool's indices of the experts that act at the site."""
        super().__init__()
        position = torch.full((pool_size + 1,), -1)  # the last one is NOBODY's
        position[experts.cpu()] = torch.arange(len(experts))
        self.register_buffer("position", position, persistent=False)
        self.lookup = lookup
        self.experts = len(experts)

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]: T / rows tokens in turn for each row; k is 1.

        A row's beams and tokens stand together, so this holds for generation too. The weight is 0
        where the row's expert does not act at this site, and for NOBODY. Raises RoutingError when
        no expert is known, or T is no multiple of the rows.
        """
        rows = self.lookup.rows
        if rows is None:
            raise RoutingError(self.lookup.unknown)
        if len(u) % len(rows):
            raise RoutingError(f"{len(u)} tokens can't be shared out to {len(rows)} inputs.")
        experts = self.position[rows.to(u.device)].repeat_interleave(len(u) // len(rows))
        return RoutingDecision(experts.clamp(min=0)[:, None], (experts >= 0).float()[:, None])

    def distribution(self, u: Tensor) -> Tensor:
        """1 for the row's expert, else 0, [T, E]; all 0 where it does not act at this site."""
        decision = self(u)
        zeros = torch.zeros(len(u), self.experts, device=u.device)
        return zeros.scatter(1, decision.experts, decision.weights)
