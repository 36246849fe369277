"""The frame of routers that choose experts for a whole input."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....errors import ConfigError, RoutingError
from ..decision import RoutingDecision
from ..lookup import Lookup
from ..mixtures import NOBODY
from ..router import Router, RouterSite, SiteRouter

__all__ = ["LookedUp", "LookedUpRouter", "rows_at"]


class LookedUp(Router):
    """The frame of routers that choose experts for a whole input."""

    @property
    def input_k(self) -> int:
        """How many experts an input gets: the setting, or else the router's own number."""
        asked = self.routing.input_k
        return self.spec.input_k if asked is None else asked

    @property
    def input_temperature(self) -> float:
        """What divides scores before the softmax: the setting, or else the router's own number."""
        asked = self.routing.input_temperature
        return self.spec.input_temperature if asked is None else asked

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site."""
        if site.lookup is None:
            raise RoutingError(f"Router {self.spec.name} has nothing to look experts up in.")
        return LookedUpRouter(site.experts, site.pool_size, site.lookup, site.sees_all)

    def needed(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """`tokenizer`, which reads prompts. Raises ConfigError when there is none."""
        if tokenizer is None:
            raise ConfigError(
                f"Router {self.spec.name} reads prompts; hand the base over with its tokenizer."
            )
        return tokenizer


class LookedUpRouter(SiteRouter):
    """At one site: the experts that the shared `Lookup` holds for each row, as it weighs them."""

    position: Tensor

    def __init__(
        self, experts: Tensor, pool_size: int, lookup: Lookup, sees_all: bool = True
    ) -> None:
        """`experts` [E] are the pool's indices of the experts that act at the site.

        `sees_all` False says that the site sees some of the rows' tokens only.
        """
        super().__init__()
        self.register_buffer("position", rows_at(experts, pool_size), persistent=False)
        self.lookup, self.sees_all = lookup, sees_all
        self.experts = len(experts)

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n], with the k of the lookup's mixtures.

        The weight is 0 where an expert of the row does not act at this site, and for NOBODY. Raises
        as `Lookup.of_each` does.
        """
        mixtures = self.lookup.of_each(u, self.sees_all)
        experts = self.position[mixtures.experts]
        return RoutingDecision(experts.clamp(min=0), mixtures.weights * (experts >= 0))

    def distribution(self, u: Tensor) -> Tensor:
        """The weights of the row's experts, else 0, [T, E]; 0 for those absent at this site."""
        decision = self(u)
        zeros = torch.zeros(len(u), self.experts, device=u.device)
        return zeros.scatter_add(1, decision.experts, decision.weights)


def rows_at(experts: Tensor, pool_size: int) -> Tensor:
    """The row in a site's stack of each index in the pool, int64 [pool_size + 1].

    `experts` [E] are the indices of those that act at the site; the others have NOBODY, and so has
    NOBODY itself, which is the last index.
    """
    rows = torch.full((pool_size + 1,), NOBODY)
    rows[experts.cpu()] = torch.arange(len(experts))
    return rows
