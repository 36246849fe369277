"""Routers that score every token against one vector per expert (METHOD sections 4 and 5).

Glossary: u input activation [T, n], v an expert's vector [n], V all vectors of a site [E, n], alpha
affinity, w weights, k experts per token. A bar (ū, v̄) means standardised over the n features.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels.native import runs_natively, top_experts
from ...kernels.triton_gpu import runs_on_triton
from ...kernels.triton_gpu import top_experts as top_experts_on_gpu
from ..decision import RoutingDecision, highest

__all__ = ["ArrowRouter", "ScoredRouter", "UniformTopKRouter", "VectorRouter", "products"]
__all__ += ["standardise"]

# A vector that differs from a constant by less than this share of its largest entry (or whose
# largest entry is below SMALLEST) has no direction worth the name: it is float32 noise.
ROUNDING = 1e-6
SMALLEST = 1e-8


def standardise(vectors: Tensor) -> Tensor:
    """Each row minus its mean over its (population) standard deviation; zeros if it is constant.

    METHOD section 4; the released code's LayerNorm adds 1e-5 under the root, which damps weakly
    trained gates. A constant row (a gate never trained) would explode here, so it becomes 0 and
    scores 0 everywhere.
    """
    exact = vectors.double()
    variance, mean = torch.var_mean(exact, dim=-1, correction=0, keepdim=True)
    deviation = variance.sqrt()
    noise = ROUNDING * vectors.abs().amax(dim=-1, keepdim=True).double().clamp(min=SMALLEST)
    centred = exact.sub_(mean).div_(deviation.clamp(min=noise))
    return centred.masked_fill_(deviation <= noise, 0.0).float()


def products(u: Tensor, vectors: Tensor) -> Tensor:
    """vᵀu for every token of u [T, n] and each of `vectors` [E, n], float32 [T, E].

    Equal vectors get equal numbers, so that they are ties. For a single token BLAS has a way of its
    own in which rounding depends on a vector's place, so one is multiplied as two are.
    """
    tokens = u.float() if len(u) != 1 else u.float().expand(2, -1)
    return (tokens @ vectors.float().T)[: len(u)]


class VectorRouter(nn.Module):
    """The frame of all scored routers: the top k of some affinity, softmax over those k.

    Of experts with equal affinities the first in the pool's order are taken, on every path.

    `vectors` are kept in the type of the model, like its weights; products and sums are float32.
    Where `fused`, `kernels.native` computes the same in one go on CPUs, `triton_gpu` on
    GPUs: v̄ᵀū over √n with `eps`, which is added to the variance of u, |vᵀu| with None.
    """

    vectors: Tensor
    fused: ClassVar[bool] = False
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
    """The top k of the affinities v̄ᵀū, softmax of α/√n over those k (METHOD section 4).

    The softmax over the chosen k alone equals the released code's softmax over all, cut to k and
    renormalised. Because v̄ sums to zero, v̄ᵀū = v̄ᵀu / sqrt(var(u) + eps): the native kernel needs
    no centring.
    """

    fused = True
    eps: float

    def __init__(self, vectors: Tensor, k: int, eps: float) -> None:
        """`vectors` [E, n] are standardised already; `k` is lowered to E."""
        super().__init__(vectors, k)
        self.eps = eps

    def affinities(self, u: Tensor) -> Tensor:
        """α/√n for every token and expert, float32 [T, E]."""
        standardised = functional.layer_norm(u.float(), u.shape[-1:], eps=self.eps)
        return products(standardised, self.vectors) / math.sqrt(u.shape[-1])


class UniformTopKRouter(ScoredRouter):
    """The same k experts as PHATGOOSE's, each with the weight 1/k: what the softmax is worth."""

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]."""
        decision = super().forward(u)
        return RoutingDecision(decision.experts, torch.full_like(decision.weights, 1 / self.k))


class ArrowRouter(VectorRouter):
    """The top k of |vᵀu|, softmax of the same numbers over those k (METHOD section 5, Arrow).

    v is the first right singular vector of the expert's B A (`per_token.arrow`), of which
    only the line matters, not the sign. Neither side is standardised and nothing is scaled, as in
    Ostapenko et al. 2024; the released code of PHATGOOSE divides by a temperature of 10 and √n.
    """

    fused = True

    def affinities(self, u: Tensor) -> Tensor:
        """|vᵀu| for every token and expert, float32 [T, E]."""
        return products(u, self.vectors).abs()
