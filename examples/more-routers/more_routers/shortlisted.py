"""PHATGOOSE on a shortlist: gates choose for every token, among the experts that fit its prompt.

Not in the paper. A token of a decoder's prompt doesn't know the task yet, its gates can't either;
the base's reading of the whole prompt does. So `routers.discriminant` shortlists some experts for
each prompt, and at every site PHATGOOSE's k experts of them act.
"""

from __future__ import annotations

import torch
from phatgoose.routing.routers.prompt_router import rows_at
from torch import Tensor

from phatgoose.experts.kind import dense_weights
from phatgoose.routing.context import RoutingContext
from phatgoose.routing.routers.discriminant import Discriminant
from phatgoose.routing.routers.phatgoose import Phatgoose, PhatgooseRouter, TopKRouter
from phatgoose.routing.routers.router import RouterSite, RoutingDecision, SiteRouter, highest


class ByDiscriminant(Phatgoose, Discriminant):
    """Router discriminant-phatgoose: the context has a shortlist, gates choose."""

    @property
    def input_k(self) -> int:
        return int(self.config.shortlist)

    @property
    def input_temperature(self) -> float:
        return float(self.config.shortlist_temperature)

    def at(self, site: RouterSite) -> SiteRouter:
        gates = PhatgooseRouter(site.state["vectors"], self.k, self.config.eps)
        context = self.context_of(site)
        return ShortlistedRouter(gates, site, context, self.config.prior)


class ShortlistedRouter(SiteRouter):
    """At one site: the top k of α/√n + λ log p over the row's shortlist, softmax of the same.

    α/√n is what `gates` score a token and expert with, p the expert's share in the row's choice,
    and λ the `prior`: with 0 the gates alone choose within the shortlist.
    """

    kept = ("vectors",)
    position: Tensor
    context: RoutingContext

    def __init__(
        self, gates: TopKRouter, site: RouterSite, context: RoutingContext, prior: float
    ) -> None:
        super().__init__()
        position = rows_at(site.experts, site.pool_size)
        self.register_buffer("position", position, persistent=False)
        self.gates, self.context, self.prior = gates, context, prior
        self.sees_all, self.block = site.sees_all, site.block

    @property
    def vectors(self) -> Tensor:
        return self.gates.vectors

    def state(self) -> dict[str, Tensor]:
        return self.gates.state()

    def forward(self, u: Tensor) -> RoutingDecision:
        return self._best(*self._shortlist(u))

    def among(self, u: Tensor, active: Tensor) -> RoutingDecision:
        experts, logits = self._shortlist(u)
        return self._best(experts, logits.masked_fill(~active.gather(1, experts), -torch.inf))

    def _best(self, experts: Tensor, logits: Tensor) -> RoutingDecision:
        best = highest(logits, min(self.gates.k, logits.shape[-1]))
        weights = logits.gather(-1, best).softmax(dim=-1).nan_to_num(0.0)  # nobody acts here: 0
        return RoutingDecision(experts.gather(-1, best), weights)

    def distribution(self, u: Tensor) -> Tensor:
        experts, logits = self._shortlist(u)
        return dense_weights(experts, logits.softmax(dim=-1).nan_to_num(0.0), len(self.vectors))

    def _shortlist(self, u: Tensor) -> tuple[Tensor, Tensor]:
        choice = self.context.of_each(u, self.sees_all, self.block)
        found = self.position[choice.experts]
        experts = found.clamp(min=0)
        logits = self.gates.affinities(u).gather(-1, experts)
        if self.prior:
            least = torch.finfo(choice.weights.dtype).tiny  # of 0 there is no logarithm
            logits = logits + self.prior * choice.weights.clamp(min=least).log()
        return experts, logits.masked_fill(found < 0, -torch.inf)
