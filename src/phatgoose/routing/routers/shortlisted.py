"""PHATGOOSE on a shortlist: gates choose for every token, among the experts that fit its prompt.

Not in the paper. A token of a decoder's prompt doesn't know the task yet, its gates can't either;
the base's reading of the whole prompt does. So a router that chooses for whole inputs shortlists
`shortlist` experts for each, and at every site PHATGOOSE's k experts of them act.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import RoutingError
from .discriminant import Discriminant
from .phatgoose import Phatgoose, TopKRouter
from .prompt_router import rows_at
from .router import Lookup, RouterSite, RoutingDecision, SiteRouter, highest


class ByDiscriminant(Phatgoose, Discriminant):
    """Router discriminant-phatgoose: a `Lookup` shortlists, gates choose."""

    @property
    def input_k(self) -> int:
        """How many experts the discriminant shortlists for an input."""
        return int(self.config.shortlist)

    @property
    def input_temperature(self) -> float:
        """What divides their scores before the softmax."""
        return float(self.config.shortlist_temperature)

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site."""
        if site.lookup is None:
            raise RoutingError(f"Router {self.spec.name} has nothing to shortlist experts with.")
        return ShortlistedRouter(self.scorer(site), site, site.lookup, self.config.prior)


class ShortlistedRouter(SiteRouter):
    """At one site: the top k of α/√n + λ log p over the row's shortlist, softmax of the same.

    α/√n is what `gates` score a token and expert with, p the expert's share in the row's mixture,
    and λ the `prior`: with 0 the gates alone choose within the shortlist.
    """

    kept = ("vectors",)
    position: Tensor

    def __init__(self, gates: TopKRouter, site: RouterSite, lookup: Lookup, prior: float) -> None:
        """`gates` score the experts of `site`, for which `lookup` holds each row's shortlist."""
        super().__init__()
        position = rows_at(site.experts, site.pool_size)
        self.register_buffer("position", position, persistent=False)
        self.gates, self.lookup, self.prior = gates, lookup, prior
        self.sees_all = site.sees_all

    @property
    def vectors(self) -> Tensor:
        """The gates [E, n], as they are scored with."""
        return self.gates.vectors

    def state(self) -> dict[str, Tensor]:
        """What the gates keep."""
        return self.gates.state()

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]: the k best of the shortlist, fewer where it has fewer.

        The weight is 0 for experts that don't act at this site. Raises as `Lookup.of_each` does.
        """
        experts, logits = self._shortlist(u)
        best = highest(logits, min(self.gates.k, logits.shape[-1]))
        weights = logits.gather(-1, best).softmax(dim=-1).nan_to_num(0.0)  # nobody acts here: 0
        return RoutingDecision(experts.gather(-1, best), weights)

    def distribution(self, u: Tensor) -> Tensor:
        """The softmax over the whole shortlist, before top-k, 0 elsewhere, [T, E]."""
        experts, logits = self._shortlist(u)
        zeros = torch.zeros(len(u), len(self.vectors), device=u.device)
        return zeros.scatter_add(1, experts, logits.softmax(dim=-1).nan_to_num(0.0))

    def _shortlist(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The shortlisted experts of each token, rows of the stack, and what they score, [T, m].

        Those that don't act at the site score minus infinity.
        """
        mixtures = self.lookup.of_each(u, self.sees_all)
        found = self.position[mixtures.experts]
        experts = found.clamp(min=0)
        logits = self.gates.affinities(u).gather(-1, experts)
        if self.prior:
            least = torch.finfo(mixtures.weights.dtype).tiny  # of 0 there is no logarithm
            logits = logits + self.prior * mixtures.weights.clamp(min=least).log()
        return experts, logits.masked_fill(found < 0, -torch.inf)
