"""Routers that score every token against one vector per expert (paper, section 3).

Glossary: u input activation [T, n], v an expert's vector [n], V all vectors of a site [E, n], α
affinity, w weights, k experts per token. A bar (ū, v̄) means standardised over the n features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...experts.pool import Pool
from ..kernels.native import runs_natively, top_experts
from ..kernels.triton_gpu import runs_on_triton
from ..kernels.triton_gpu import top_experts as top_experts_on_gpu
from .router import Router, RoutingDecision, SiteRouter, highest

# A vector that differs from a constant by less than this share of its largest entry (or whose
# largest entry is below SMALLEST) has no direction worth the name: it is float32 noise.
ROUNDING = 1e-6
SMALLEST = 1e-8


def standardise(vectors: Tensor) -> Tensor:
    """Each row minus its mean over its (population) standard deviation; zeros if it is constant.

    Paper, section 3. The released code's LayerNorm adds 1e-5 under the root, which damps weakly
    trained gates. A constant row (a gate never trained) has no direction: it becomes 0 and scores 0
    everywhere.
    """
    exact = vectors.double()
    variance, mean = torch.var_mean(exact, dim=-1, correction=0, keepdim=True)
    deviation = variance.sqrt()
    noise = ROUNDING * vectors.abs().amax(dim=-1, keepdim=True).double().clamp(min=SMALLEST)
    centred = exact.sub_(mean).div_(deviation.clamp(min=noise))
    return centred.masked_fill_(deviation <= noise, 0.0).float()


def products(u: Tensor, vectors: Tensor) -> Tensor:
    """vᵀu for every token of u [T, n] and each of `vectors` [E, n], float32 [T, E].

    Equal vectors get equal numbers, so that they are ties. How BLAS rounds depends on a vector's
    place (on a CPU in ways of each processor's own, on a GPU for a single token); so CPUs multiply
    in float64, whose roundings float32 doesn't show, and GPUs one token as two.
    """
    if u.device.type == "cpu":
        return (u.double() @ vectors.double().T).float()
    tokens = u.float() if len(u) != 1 else u.float().expand(2, -1)
    return (tokens @ vectors.float().T)[: len(u)]


class VectorRouter(SiteRouter):
    """The frame of all scored routers: the top k of some affinity, softmax over those k.

    Of experts with equal affinities the first in the pool's order are taken, on every path.

    `vectors` have the type of the model's weights; products and sums are float32. Where `fused`,
    one call of `kernels.native` computes the same on CPUs and of `kernels.triton_gpu` on GPUs:
    v̄ᵀū over √n with `eps`, which is added to the variance of u, |vᵀu| with None.
    """

    kept: ClassVar[tuple[str, ...]] = ("vectors",)
    fused: ClassVar[bool] = False
    vectors: Tensor
    eps: float | None = None

    def __init__(self, vectors: Tensor, k: int) -> None:
        """`vectors` [E, n], ready to score with; `k` is lowered to E."""
        super().__init__()
        self.register_buffer("vectors", vectors.float(), persistent=False)
        self.k = min(k, vectors.shape[0])

    def affinities(self, u: Tensor) -> Tensor:
        """What the softmax is taken of, for every token and expert, float32 [T, E]."""
        raise NotImplementedError

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]."""
        if self.fused and runs_natively(u, self.vectors):
            return RoutingDecision(*top_experts(u, self.vectors, self.k, self.eps))
        if self.fused and runs_on_triton(u, self.vectors):
            return RoutingDecision(*top_experts_on_gpu(u, self.vectors, self.k, self.eps))
        affinities = self.affinities(u)
        experts = highest(affinities, self.k)
        return RoutingDecision(experts, affinities.gather(-1, experts).softmax(dim=-1))

    def distribution(self, u: Tensor) -> Tensor:
        """The softmax of the affinities over all experts, before top-k, [T, E]."""
        return self.affinities(u).softmax(dim=-1)


class ScoredRouter(VectorRouter):
    """The top k of the affinities v̄ᵀū, softmax of α/√n over those k (paper, section 3).

    The softmax over the chosen k alone equals the released code's softmax over all, cut to k and
    renormalised. Because v̄ sums to zero, v̄ᵀū = v̄ᵀu / sqrt(var(u) + eps): the native kernel needs
    no centring.
    """

    fused = one_call = True
    eps: float

    def __init__(self, vectors: Tensor, k: int, eps: float) -> None:
        """`vectors` [E, n] are standardised already; `k` is lowered to E."""
        super().__init__(vectors, k)
        self.eps = eps

    def affinities(self, u: Tensor) -> Tensor:
        """α/√n for every token and expert, float32 [T, E]."""
        standardised = functional.layer_norm(u.float(), u.shape[-1:], eps=self.eps)
        return products(standardised, self.vectors) / math.sqrt(u.shape[-1])


class ScoredByVectors(Router):
    """The frame of routers that score with one vector per expert."""

    @property
    def form(self) -> Mapping[str, str]:
        """One vector [E, n] at each site."""
        return {"vectors": "En"}

    def vectors_at(self, pool: Pool, site: str) -> Tensor:
        """The vectors of the experts of `pool` that act at `site`, ready to score with."""
        raise NotImplementedError

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        """The vectors, divided by the temperature, which divides their products with anything."""
        vectors, temperature = self.vectors_at(pool, site), self.routing.router_temperature
        return {"vectors": vectors if temperature == 1 else vectors / temperature}
