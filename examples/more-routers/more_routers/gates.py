"""Variants of PHATGOOSE: equal weights, and scores relative to neutral text.

Neither is in the paper. `calibrated` scores (α/√n − a_z) / s_z, with mean a and deviation s of α/√n
over neutral text, so that no expert is favoured by text as such (SEQR, arXiv 2509.18093, does so
with norms).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.phatgoose import Phatgoose, PhatgooseRouter
from phatgoose.routing.routers.router import (
    RouterSite,
    RoutingDecision,
    SiteRouter,
    equal_shares,
    highest_active,
)

from .neutral import over_neutral_text


class UniformTopK(Phatgoose):
    """Router uniform-top-k: PHATGOOSE's experts with equal weights, the softmax left out."""

    def at(self, site: RouterSite) -> SiteRouter:
        return UniformTopKRouter(site.state["vectors"], self.k, self.config.eps)


class UniformTopKRouter(PhatgooseRouter):
    """The same k experts as PHATGOOSE's, each with the weight 1/k."""

    one_call = False

    def forward(self, u: Tensor) -> RoutingDecision:
        return self._equal(super().forward(u))

    def decide(self, sums: Tensor, n: int) -> RoutingDecision:
        return self._equal(super().decide(sums, n))

    def _equal(self, decision: RoutingDecision) -> RoutingDecision:
        return RoutingDecision(decision.experts, torch.full_like(decision.weights, 1 / self.k))

    def among(self, u: Tensor, active: Tensor) -> RoutingDecision:
        experts, acts = highest_active(self.affinities(u), self.k, active)
        return RoutingDecision(experts, equal_shares(acts))


class Calibrated(Phatgoose):
    """Router calibrated."""

    calibration: Mapping[str, tuple[Tensor, Tensor]] = {}  # a and s [E] by site

    @property
    def form(self) -> Mapping[str, str]:
        return {**super().form, "usual": "E", "spread": "E"}

    def read_base(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, pool: Pool
    ) -> None:
        if tokenizer is None:
            raise ConfigError(
                "Router calibrated reads neutral text; hand the base over with its tokenizer."
            )
        vectors = {name: self.vectors_at(pool, name) for name in pool.sites}

        def affinities(name: str, u: Tensor) -> Tensor:
            router = PhatgooseRouter(vectors[name], self.k, self.config.eps)
            return router.to(u.device).affinities(u)

        self.calibration = over_neutral_text(model, tokenizer, vectors, affinities)

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        usual, spread = self.calibration[site]
        spread = spread.masked_fill(spread == 0, 1.0)  # a constant vector scores 0 everywhere
        usual = usual / self.config.temperature
        return {**super().state_at(pool, site), "usual": usual, "spread": spread}

    def at(self, site: RouterSite) -> SiteRouter:
        return CalibratedRouter(site.state, self.k, self.config.eps)


class CalibratedRouter(PhatgooseRouter):
    """The top k of (α/√n − a) / s, softmax of the same over those k."""

    kept = ("vectors", "usual", "spread")
    fused = one_call = False
    usual: Tensor
    spread: Tensor

    def __init__(self, state: Mapping[str, Tensor], k: int, eps: float) -> None:
        super().__init__(state["vectors"], k, eps)
        for name in ("usual", "spread"):
            self.register_buffer(name, state[name].float(), persistent=False)

    def affinities(self, u: Tensor) -> Tensor:
        return self._calibrated(super().affinities(u))

    def affinities_of(self, sums: Tensor, n: int) -> Tensor:
        return self._calibrated(super().affinities_of(sums, n))

    def _calibrated(self, affinities: Tensor) -> Tensor:
        return (affinities - self.usual) / self.spread
