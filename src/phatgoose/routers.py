"""Routers: which experts act on a token at a site, and how much (METHOD sections 4 and 5).

Glossary: u input activation [T, n], v an expert's gate [n], V all gates of a site [E, n], alpha
affinity, w weights, k experts per token. A bar (ū, v̄) means standardised over the n features.

A router is a module per site that answers every token with a `RoutingDecision`. Two kinds exist so
far: *scored* (by affinity between activation and vectors) and *constant*.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import Routing
from .errors import ConfigError
from .pool import Pool

__all__ = [
    "ROUTERS",
    "ConstantRouter",
    "RoutingDecision",
    "ScoredRouter",
    "make_router",
    "standardise",
]

# A vector that differs from a constant by less than this share of its largest entry (or whose
# largest entry is below SMALLEST) has no direction worth the name: it is float32 noise.
ROUNDING = 1e-6
SMALLEST = 1e-8


@dataclass(frozen=True)
class RoutingDecision:
    """The experts chosen for each of T tokens, best first.

    `experts` [T, k] are rows of the site's stack, `weights` [T, k] float32 and sum to 1 for every
    real token. Weights of padding tokens are all 0.
    """

    experts: Tensor
    weights: Tensor


def standardise(vectors: Tensor) -> Tensor:
    """Each row minus its mean over its (population) standard deviation; zeros if it is constant.

    METHOD section 4; the released code's LayerNorm adds 1e-5 under the root, which damps weakly
    trained gates. A constant row (a gate never trained) would explode here, so it becomes 0 and
    scores 0 everywhere.
    """
    exact = vectors.double()
    deviation = exact.std(dim=-1, unbiased=False, keepdim=True)
    noise = ROUNDING * exact.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST)
    centred = exact - exact.mean(dim=-1, keepdim=True)
    return (centred / deviation.clamp(min=noise)).where(deviation > noise, 0.0).float()


class ScoredRouter(nn.Module):
    """The top k of the affinities v̄ᵀū, softmax of α/√n over those k (METHOD section 4).

    Because v̄ sums to zero, v̄ᵀū = v̄ᵀu / sqrt(var(u) + eps): u needs no centring. The softmax over
    the chosen k alone equals the released code's softmax over all, cut to k and renormalised.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor, k: int, eps: float) -> None:
        """`vectors` [E, n] are standardised already; `k` is lowered to E."""
        super().__init__()
        self.register_buffer("vectors", vectors.float(), persistent=False)
        self.k = min(k, vectors.shape[0])
        self.eps = eps

    def affinities(self, u: Tensor) -> Tensor:
        """α/√n for every token and expert, float32 [T, E]."""
        u = u.float()
        deviation = (u.var(dim=-1, unbiased=False, keepdim=True) + self.eps).sqrt()
        return u @ self.vectors.T / (deviation * math.sqrt(u.shape[-1]))

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]."""
        chosen = self.affinities(u).topk(self.k, dim=-1)
        return RoutingDecision(chosen.indices, chosen.values.softmax(dim=-1))


class ConstantRouter(nn.Module):
    """The same weights for every token, over all experts of the site."""

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        """`weights` [E]."""
        super().__init__()
        self.register_buffer("weights", weights.float(), persistent=False)

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]; k is E."""
        experts = torch.arange(len(self.weights), device=u.device)
        return RoutingDecision(experts.expand(len(u), -1), self.weights.expand(len(u), -1))


Vectors = Callable[[Pool, str], Tensor]  # (pool, site) -> [E, n]


def _scored_by(kind: str) -> Vectors:
    return lambda pool, site: pool.vectors(kind, site)


SCORED: dict[str, Vectors] = {
    "phatgoose": _scored_by("gates"),
    "average-activation": _scored_by("means"),
}
MERGED = "merged"
ROUTERS = (*SCORED, MERGED)


def router_vectors(pool: Pool, site: str, router: str) -> Tensor | None:
    """The standardised vectors [E, n] that `router` scores with at `site`, None if it has none.

    Raises ConfigError for an unknown router and PoolError when an expert lacks the vectors.
    """
    if router not in ROUTERS:
        raise ConfigError(f"router is {router!r}, but must be one of {', '.join(ROUTERS)}.")
    return standardise(SCORED[router](pool, site).float()) if router in SCORED else None


def make_router(vectors: Tensor | None, experts: int, routing: Routing) -> nn.Module:
    """The router module of one site at which so many `experts` act.

    Without `vectors` it is the uniform one: the exact mean of all updates B A (METHOD section 5,
    Merged Experts), not the mean of A times the mean of B.
    """
    if vectors is None:
        return ConstantRouter(torch.full((experts,), 1 / experts))
    return ScoredRouter(vectors, routing.k, routing.eps)


def warn_of_untrained(pool: Pool, router: str, vectors: Mapping[str, Tensor | None]) -> None:
    """Warn once of each expert with `vectors` (by site, standardised) that have no direction."""
    flat = dict.fromkeys(pool.names, 0)
    for site, rows in vectors.items():
        if rows is None:
            continue
        present = [expert.name for expert in pool.experts if site in expert.lora]
        for name, row in zip(present, rows, strict=True):
            flat[name] += int(not row.any())
    for name, sites in flat.items():
        if sites:
            warnings.warn(
                f"Expert {name!r} has a constant vector for router {router!r} at {sites} of "
                f"{len(vectors)} sites (never trained?); it scores 0 there.",
                stacklevel=3,
            )
