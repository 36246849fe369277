"""Variants of PHATGOOSE: equal weights, and scores relative to neutral text.

Neither is in the paper. `calibrated` scores (α/√n − a_z) / s_z, with mean a and deviation s of α/√n
over neutral text, so that no expert is favoured by text as such (SEQR, arXiv 2509.18093, does so
with norms). Its `temperature` divides these scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.phatgoose import Phatgoose, affinities
from phatgoose.routing.routers.router import RouterAtSite

from .neutral import Moments, over_neutral_text


@dataclass(frozen=True)
class UniformTopK(Phatgoose):
    """PHATGOOSE's k experts with equal weights, the softmax left out."""

    name, label = "uniform-top-k", "Uniform top-k"
    fused, equal = "", True


@dataclass(frozen=True)
class Calibrated(Phatgoose):
    """PHATGOOSE's k experts, by scores relative to each gate's own on neutral text."""

    name, label, fused, grows = "calibrated", "Calibrated", "", False
    sizes: ClassVar = {**Phatgoose.sizes, "usual": "E", "spread": "E"}

    calibration: Moments = field(default_factory=dict, compare=False, repr=False)

    def fitted(
        self, pool: Pool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> Self:
        plain = super().table
        vectors = {name: plain(pool, name)["vectors"] for name in pool.sites}
        moments = over_neutral_text(
            model,
            tokenizer,
            vectors,
            lambda name, u: affinities(u, vectors[name].to(u.device), self.eps),
        )
        return replace(self, calibration=moments)

    def table(self, pool: Pool, site: str) -> dict[str, Tensor]:
        usual, spread = self.calibration[site]
        spread = spread.masked_fill(spread == 0, 1.0)  # a constant vector scores 0 everywhere
        # Gates, and so usual and spread, are divided by the temperature, which then cancels out.
        warm = spread * self.temperature
        return {**super().table(pool, site), "usual": usual, "spread": warm}

    def scores(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        return (super().scores(u, at_site) - at_site.usual) / at_site.spread
