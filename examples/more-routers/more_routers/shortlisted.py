"""PHATGOOSE on a shortlist: gates choose for every token, among the experts that fit its prompt.

Not in the paper. A token of a decoder's prompt doesn't know the task yet, its gates can't either;
the base's reading of the whole prompt does. So `routers.discriminant` shortlists some experts for
each prompt, and at every site PHATGOOSE's k experts of them act.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from phatgoose.config import AT_LEAST_1, NOT_NEGATIVE
from phatgoose.experts.sums import dense_weights
from phatgoose.routing.choice import Choice
from phatgoose.routing.routers.discriminant import Discriminant
from phatgoose.routing.routers.phatgoose import Phatgoose, Temperature
from phatgoose.routing.routers.prompt import best_of, choice_at
from phatgoose.routing.routers.router import RouterAtSite, RoutingDecision, highest


@dataclass(frozen=True)
class ByDiscriminant(Phatgoose, Discriminant):
    """PHATGOOSE's k experts, among those that discriminant shortlists for the prompt.

    At a site: the top k of α/√n + λ log p over the row's shortlist, softmax of the same. α/√n is
    what gates score a token and expert with, p the expert's share in the row's choice, and λ the
    `prior`: with 0 the gates alone choose within the shortlist.
    """

    name = "discriminant-phatgoose"
    label = "Discriminant + PHATGOOSE"
    needs = ("gates", "prompt_statistics")
    fused, per_input, by_token = "", False, False

    temperature: Temperature = 1.0
    fallback: Literal["off"] = "off"  # no setting: a shortlist has experts
    shortlist: Annotated[int, "Experts to choose among, for each input.", AT_LEAST_1] = 5
    shortlist_temperature: Temperature = 0.1
    prior: Annotated[
        float, "Weight of an expert's share of the shortlist, relative to its gates.", NOT_NEGATIVE
    ] = 1.0

    @property
    def prompt_k(self) -> int:
        return self.shortlist

    def choice(self, scores: Tensor) -> Choice:
        return best_of(scores, self.shortlist, self.shortlist_temperature)

    def decision(
        self, u: Tensor, at_site: RouterAtSite, active: Tensor | None = None
    ) -> RoutingDecision:
        experts, logits = self._shortlisted(u, at_site)
        if active is not None:
            logits = logits.masked_fill(~active.gather(1, experts), -torch.inf)
        best = highest(logits, min(at_site.k, logits.shape[-1]))
        weights = logits.gather(-1, best).softmax(dim=-1).nan_to_num(0.0)  # nobody acts here: 0
        return RoutingDecision(experts.gather(-1, best), weights)

    def distribution(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        experts, logits = self._shortlisted(u, at_site)
        return dense_weights(experts, logits.softmax(dim=-1).nan_to_num(0.0), at_site.E)

    def _shortlisted(self, u: Tensor, at_site: RouterAtSite) -> tuple[Tensor, Tensor]:
        choice = choice_at(u, at_site)
        found = at_site.position[choice.experts]
        experts = found.clamp(min=0)
        logits = self.scores(u, at_site).gather(-1, experts)
        if self.prior:
            least = torch.finfo(choice.weights.dtype).tiny  # of 0 there is no logarithm
            logits = logits + self.prior * choice.weights.clamp(min=least).log()
        return experts, logits.masked_fill(found < 0, -torch.inf)
