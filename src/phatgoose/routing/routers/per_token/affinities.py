"""Other ways to hold gates (or mean activations) against activations than the paper's.

docs/study.md compares them. The symbols are those of `per_token.scored`. Besides, M is the
mean activation of the pool at a site [n], the mean over experts of the means that they share.

standardised  v̄ᵀū, over √n: METHOD section 4
raw           vᵀu, what the gate's sigmoid was trained on, so the gates' norms count
trimmed       v̄ᵀū without the features in which M is largest: both are standardised over the others
centred       v̄ᵀ(u - M) over the deviation of u, over √n: how far u is from the usual activation
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....experts.pool import Pool
from ..decision import highest
from .scored import ScoredRouter, VectorRouter, products, standardise

__all__ = [
    "AFFINITIES",
    "NEED_MEANS",
    "PAPER",
    "CentredRouter",
    "RawRouter",
    "TrimmedRouter",
    "affinity_router",
    "affinity_vectors",
]

PAPER = "standardised"
AFFINITIES = (PAPER, "raw", "trimmed", "centred")
NEED_MEANS = ("trimmed", "centred")
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

    fused = False

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

    fused = False

    def affinities(self, u: Tensor) -> Tensor:
        """What the softmax is taken of, for every token and expert, float32 [T, E]."""
        exact, vectors = u.float(), self.vectors.float()
        # Ten times as fast as Tensor.var, which torch does not vectorise on CPUs.
        variance = (exact - exact.mean(dim=-1, keepdim=True)).square_().mean(dim=-1, keepdim=True)
        scale = (variance + self.eps).sqrt()
        affinities = products(exact, vectors[:, :-1]) + vectors[:, -1]
        return affinities / scale / math.sqrt(u.shape[-1])


def affinity_vectors(pool: Pool, site: str, kind: str, affinity: str) -> Tensor:
    """What the router of `affinity` scores with at `site`: [E, n], for centred [E, n + 1].

    `kind` is "gates" or "means". Raises PoolError when an expert lacks them or its means where
    these are needed.
    """
    vectors = pool.vectors(kind, site).float()
    if affinity == "raw":
        return vectors
    if affinity not in NEED_MEANS:
        return standardise(vectors)
    mean = pool.vectors("means", site).float().mean(dim=0)
    if affinity == "trimmed":
        return _trimmed(vectors, mean)
    standardised = standardise(vectors)
    return torch.cat([standardised, -(standardised @ mean)[:, None]], dim=1)


def affinity_router(vectors: Tensor, affinity: str, k: int, eps: float) -> VectorRouter:
    """The router of `affinity`, which scores with `vectors` as `affinity_vectors` made them."""
    if affinity == "raw":
        return RawRouter(vectors, k)
    kinds = {"trimmed": TrimmedRouter, "centred": CentredRouter}
    return kinds.get(affinity, ScoredRouter)(vectors, k, eps)


def _trimmed(vectors: Tensor, mean: Tensor) -> Tensor:
    """`vectors` standardised over all features but those of the largest |mean|, 0 in these."""
    count = max(1, round(TRIMMED * len(mean)))
    left = torch.ones_like(mean, dtype=torch.bool)
    left[highest(mean.abs(), count)] = False
    trimmed = torch.zeros_like(vectors)
    trimmed[:, left] = standardise(vectors[:, left])
    return trimmed
