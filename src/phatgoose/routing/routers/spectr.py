"""SpectR: the experts whose updates look at most of the token's activation.

Fleshman and Van Durme, COLM 2025 (arXiv 2504.03454). With B A = U S Vᵀ an expert's factors are
A* = Vᵀ and B* = U S; its score for a token is |A* u|, the length of u in the input space of the
update. S plays no part: an expert that hardly stretches a direction scores as one that stretches it
much. The k experts with the highest scores get the weight 1/k each.

As published, k is 4, while `k` has its usual default here. The released code multiplies A* by the
LoRAs' common scale, which changes no ranking, keeps a rank's direction even where its singular
value is 0 (here it is left out, so an update of zero scores 0), and mixes the factors before their
product, (Σ w B*)(Σ w A*) u, so that B* of one expert meets A* of another. Here outputs are mixed,
Σ w B A u, which for k = 1 is the same.

With `shortlist` = N the choice is that of LAG (Fleshman and Van Durme, arXiv 2507.05346,
equations 6 and 7): of the N experts with the highest |a₁ᵀu|, a₁ being the first row of A* (Arrow's
vector), those with the highest |A* u|. LAG takes one of 20 (k = 1) and saves the other products by
that; here all are computed, for the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...experts.lora import LoraFactors
from ...experts.pool import Pool
from .arrow import small_svd
from .phatgoose import products
from .router import (
    Router,
    RouterSite,
    RoutingDecision,
    SiteRouter,
    equal_shares,
    highest,
    highest_active,
)

NOTHING = 1e-6  # singular values below this share of the largest are rounding
DIRECTIONS = "directions"  # the name of A* in files


def padded_rows(pool: Pool, site: str, rows_of: Callable[[LoraFactors], Tensor]) -> Tensor:
    """`rows_of` each LoRA at `site`, [E, q, n], with zeros up to the highest rank q."""
    held = [rows_of(expert.lora[site]) for expert in pool.experts if site in expert.lora]
    rank = max(len(rows) for rows in held)
    return torch.stack([functional.pad(rows, (0, 0, 0, rank - len(rows))) for rows in held])


class Spectr(Router):
    @property
    def form(self) -> Mapping[str, str]:
        return {DIRECTIONS: "Eqn"}

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        return {DIRECTIONS: padded_rows(pool, site, right_singular_vectors)}

    def at(self, site: RouterSite) -> SiteRouter:
        return SpectrRouter(site.state[DIRECTIONS], self.k, self.config.shortlist)


class SpectrRouter(SiteRouter):
    """The top k of |A* u|, each with the weight 1/k; among a shortlist if there is one."""

    kept: ClassVar[tuple[str, ...]] = (DIRECTIONS,)
    by_token = True
    directions: Tensor

    def __init__(self, directions: Tensor, k: int, shortlist: int | None = None) -> None:
        """`directions` [E, q, n] are the rows of A*; by the first `shortlist` are left."""
        super().__init__()
        self.register_buffer(DIRECTIONS, directions.float(), persistent=False)
        self.k = min(k, len(directions))
        self.shortlist = None if shortlist is None else max(self.k, shortlist)

    def scores(self, u: Tensor) -> Tensor:
        E, q, n = self.directions.shape
        along = products(u, self.directions.reshape(E * q, n)).view(len(u), E, q)
        scores: Tensor = along.norm(dim=-1)
        if self.shortlist is None or self.shortlist >= E:
            return scores
        listed = highest(along[..., 0].abs(), self.shortlist)
        off = torch.full_like(scores, -torch.inf)
        return off.scatter(1, listed, scores.gather(1, listed))

    def forward(self, u: Tensor) -> RoutingDecision:
        experts = highest(self.scores(u), self.k)
        return RoutingDecision(experts, torch.full(experts.shape, 1 / self.k, device=u.device))

    def among(self, u: Tensor, active: Tensor) -> RoutingDecision:
        scores = self.scores(u)
        experts, acts = highest_active(scores, self.k, active & (scores > -torch.inf))
        return RoutingDecision(experts, equal_shares(acts))

    def distribution(self, u: Tensor) -> Tensor:
        return self.scores(u).softmax(dim=-1)


def right_singular_vectors(lora: LoraFactors) -> Tensor:
    """A* = Vᵀ of B A = U S Vᵀ, float32 [r, n], the largest S first; zeros where S is 0."""
    small = small_svd(lora.A, lora.B)
    left_out = small.values <= NOTHING * small.values[0]
    rows = small.V[: len(small.values)] @ small.Q.T
    return rows.masked_fill(left_out[:, None], 0.0).float()
