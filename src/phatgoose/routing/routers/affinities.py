"""Affinities: five ways to score activations against gates or mean activations.

The first study compares them. The symbols are those of `routers.vector_router`. M is the mean
activation of the pool at a site [n]: the mean over experts of the means that they share, none of
which moves it by more than the pool's median is worth (`routers.bounds`).

standardised  v̄ᵀū, over √n: the paper's (section 3)
raw           vᵀu, what the gate's sigmoid was trained on, so the gates' norms count
trimmed       v̄ᵀū without the features in which M is largest: both are standardised over the others
centred       v̄ᵀ(u - M) over the deviation of u, over √n: how far u is from the usual activation
calibrated    (α - a) / s, α the paper's over √n, a and s its mean and deviation over neutral text,
              by expert: none is favoured by text as such (SEQR, 2509.18093, does so with norms)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import PAPER
from ...errors import ConfigError
from ...experts.pool import Pool
from ...tasks.neutral import over_neutral_text
from .bounds import bounded_means
from .router import RouterSite, SiteRouter, check_needs, highest
from .vector_router import ScoredByVectors, ScoredRouter, VectorRouter, products, standardise

NEED_MEANS = ("trimmed", "centred")
CALIBRATED = "calibrated"
TRIMMED = 0.01  # the share of a site's features that is left out


class RawRouter(VectorRouter):
    """The top k of vᵀu, softmax of the same numbers over those k."""

    def affinities(self, u: Tensor) -> Tensor:
        """vᵀu for every token and expert, float32 [T, E]."""
        return products(u, self.vectors)


class TrimmedRouter(ScoredRouter):
    """The top k of v̄ᵀū over the features that are left, softmax of α/√m over those k.

    m is their number. `vectors` [E, n] are 0 in the features left out, standardised in the others.
    """

    fused = one_call = False

    def affinities(self, u: Tensor) -> Tensor:
        """α/√m for every token and expert, float32 [T, E]."""
        vectors = self.vectors.float()
        left = vectors.ne(0).any(dim=0).float()
        count = left.sum().clamp(min=1)
        mean = (u.float() @ left / count)[:, None]
        variance = ((u.float() - mean).square() @ left / count)[:, None]
        return products(u, vectors) / ((variance + self.eps) * count).sqrt()


class CentredRouter(ScoredRouter):
    """The top k of v̄ᵀ(u - M) / sqrt(var(u) + eps), softmax of the same over √n over those k.

    `vectors` [E, n + 1] are standardised, with -v̄ᵀM in the last column.
    """

    fused = one_call = False

    def affinities(self, u: Tensor) -> Tensor:
        """What the softmax is taken of, for every token and expert, float32 [T, E]."""
        exact, vectors = u.float(), self.vectors.float()
        # Ten times as fast as Tensor.var, which torch does not vectorise on CPUs.
        variance = (exact - exact.mean(dim=-1, keepdim=True)).square_().mean(dim=-1, keepdim=True)
        scale = (variance + self.eps).sqrt()
        affinities = products(exact, vectors[:, :-1]) + vectors[:, -1]
        return affinities / scale / math.sqrt(u.shape[-1])


class CalibratedRouter(ScoredRouter):
    """The top k of (α/√n - a) / s, softmax of the same over those k."""

    kept = ("vectors", "usual", "spread")
    fused = one_call = False
    usual: Tensor
    spread: Tensor

    def __init__(self, state: Mapping[str, Tensor], k: int, eps: float) -> None:
        """`state` are the standardised vectors, a as `usual` [E] and s as `spread` [E]."""
        super().__init__(state["vectors"], k, eps)
        for name in ("usual", "spread"):
            self.register_buffer(name, state[name].float(), persistent=False)

    def affinities(self, u: Tensor) -> Tensor:
        """What the softmax is taken of, for every token and expert, float32 [T, E]."""
        return (super().affinities(u) - self.usual) / self.spread


def affinity_vectors(pool: Pool, site: str, kind: str, affinity: str) -> Tensor:
    """What the router of `affinity` scores with at `site`: [E, n], for centred [E, n + 1].

    `kind` is "gates" or "means", which all experts of `pool` have, as they have means where the
    affinity needs these (`AffinityRouting.check`).
    """
    vectors = pool.vectors(kind, site).float()
    if affinity == "raw":
        return vectors
    if affinity not in NEED_MEANS:
        return standardise(vectors)
    mean = bounded_means(pool.vectors("means", site).float()).mean(dim=0)
    if affinity == "trimmed":
        return _trimmed(vectors, mean)
    standardised = standardise(vectors)
    return torch.cat([standardised, -(standardised @ mean)[:, None]], dim=1)


class AffinityRouting(ScoredByVectors):
    """The frame of the routers that score with one of the affinities."""

    vectors: ClassVar[str]  # what of an expert is scored with: "gates" or "means"
    calibration: Mapping[str, tuple[Tensor, Tensor]] = {}  # a and s [E] by site, where needed

    def read_base(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, pool: Pool
    ) -> None:
        """Measure affinity calibrated's a and s. Raises ConfigError without a `tokenizer`."""
        if self.routing.affinity != CALIBRATED:
            return
        if tokenizer is None:
            raise ConfigError(
                "Affinity calibrated reads neutral text; hand the base over with its tokenizer."
            )
        vectors = {name: self.vectors_at(pool, name) for name in pool.sites}

        def affinities(name: str, u: Tensor) -> Tensor:
            router = ScoredRouter(vectors[name], self.routing.k, self.routing.eps)
            return router.to(u.device).affinities(u)

        self.calibration = over_neutral_text(model, tokenizer, vectors, affinities)

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        """The vectors, and what calibrates their affinities.

        The temperature divides vectors and a, hence (α - a) / s.
        """
        state = super().state_at(pool, site)
        if self.routing.affinity == CALIBRATED:
            (usual, spread), temperature = self.calibration[site], self.routing.router_temperature
            spread = spread.masked_fill(spread == 0, 1.0)  # a constant vector scores 0 everywhere
            state |= {"usual": usual / temperature, "spread": spread}
        return state

    def check(self, pool: Pool) -> None:
        """Raise PoolError when experts lack the vectors, or the means that the affinity needs."""
        super().check(pool)
        if self.routing.affinity in NEED_MEANS:
            check_needs(pool, ("means",), "")

    def refuse_other_affinities(self, what: str) -> None:
        """Raise ConfigError for another affinity than the paper's, which `what` can't have."""
        if self.routing.affinity != PAPER:
            raise ConfigError(
                f"affinity is {self.routing.affinity!r}, but {what} can only be {PAPER}."
            )

    @property
    def grows(self) -> str | None:
        """Some affinities depend on the means of the whole pool."""
        if self.routing.affinity in NEED_MEANS:
            return (
                f"Affinity {self.routing.affinity} depends on the means of the whole pool; compose "
                f"it anew."
            )
        if self.routing.affinity == CALIBRATED:
            return "Affinity calibrated is measured with the base alone; compose the pool anew."
        return super().grows

    @property
    def form(self) -> Mapping[str, str]:
        """Vectors [E, n], for affinity centred [E, n + 1]; for calibrated also a and s [E]."""
        calibration = {"usual": "E", "spread": "E"}
        more = calibration if self.routing.affinity == CALIBRATED else {}
        return {"vectors": "Ev" if self.routing.affinity == "centred" else "En", **more}

    def vectors_at(self, pool: Pool, site: str) -> Tensor:
        """The vectors as the affinity has them."""
        return affinity_vectors(pool, site, self.vectors, self.routing.affinity)

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site."""
        return self.scorer(site)

    def scorer(self, site: RouterSite) -> VectorRouter:
        """What scores with the affinity at one site."""
        vectors, k, eps = site.state["vectors"], self.routing.k, self.routing.eps
        if self.routing.affinity == "raw":
            return RawRouter(vectors, k)
        if self.routing.affinity == CALIBRATED:
            return CalibratedRouter(site.state, k, eps)
        kinds = {"trimmed": TrimmedRouter, "centred": CentredRouter}
        return kinds.get(self.routing.affinity, ScoredRouter)(vectors, k, eps)


def _trimmed(vectors: Tensor, mean: Tensor) -> Tensor:
    """`vectors` standardised over the features of small |mean|; 0 in the others."""
    count = max(1, round(TRIMMED * len(mean)))
    left = torch.ones_like(mean, dtype=torch.bool)
    left[highest(mean.abs(), count)] = False
    trimmed = torch.zeros_like(vectors)
    trimmed[:, left] = standardise(vectors[:, left])
    return trimmed
