"""PHATGOOSE's router, the paper's section 3 (Muqeeth et al. 2024), and average activation.

For a token's activation u [n] at a site, and the gates v_z [n] of the E experts that act there:

    v̄_z = (v_z − mean v_z) / std v_z         once, when the pool is composed        standardise
    ū   = (u − mean u) / √(var u + ε)                                               affinities
    α_z = v̄_zᵀ ū                                                                    affinities
    E_t = the k experts with the highest α                                          forward
    w_z = softmax of α_z / √n over E_t                                              forward
    y   = W u + Σ_{z ∈ E_t} w_z B_z A_z u                                           routing.layers

Means and deviations are over the n features. ε = 1e-5 is that of the released code's LayerNorm; the
paper has none. The code takes the softmax over all experts, then cuts it to k and renormalises:
the same function. A gate's sigmoid and norm play no part, only its direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...experts.pool import Pool
from ..kernels import native, triton_gpu
from .router import (
    Router,
    RouterSite,
    RoutingDecision,
    SiteRouter,
    highest,
    highest_active,
)

# A vector that differs from a constant by less than this share of its largest entry (or whose
# largest entry is below SMALLEST) has no direction worth the name: it is float32 noise.
ROUNDING = 1e-6
SMALLEST = 1e-8


def standardise(vectors: Tensor) -> Tensor:
    """v̄ of each row of `vectors` [E, n], float32; zeros for a constant row, an untrained gate."""
    exact = vectors.double()
    variance, mean = torch.var_mean(exact, dim=-1, correction=0, keepdim=True)
    deviation = variance.sqrt()
    # A clamp and no ε under the root, which would damp gates that were trained little.
    noise = ROUNDING * vectors.abs().amax(dim=-1, keepdim=True).double().clamp(min=SMALLEST)
    centred = exact.sub_(mean).div_(deviation.clamp(min=noise))
    return centred.masked_fill_(deviation <= noise, 0.0).float()


def products(u: Tensor, vectors: Tensor) -> Tensor:
    """vᵀu for each token of u [T, n] and each of `vectors` [E, n], float32 [T, E]; ties stay so."""
    if u.device.type == "cpu":
        # Equal vectors must score equally, but how BLAS rounds in float32 depends on a vector's
        # place. Float64's roundings don't show in float32.
        return (u.double() @ vectors.double().T).float()
    # On a GPU only single tokens are rounded by place (gemv): so one goes as two.
    tokens = u.float() if len(u) != 1 else u.float().expand(2, -1)
    return (tokens @ vectors.float().T)[: len(u)]


class TopKRouter(SiteRouter):
    """The k experts with the highest affinities, of equals the first, by softmax over those k.

    `vectors` have the type of the model's weights; products and sums are float32. If `fused`, one
    native call on CPUs, or Triton's on GPUs, does the same: v̄ᵀū/√n with `eps`, |vᵀu| without.
    """

    kept: ClassVar[tuple[str, ...]] = ("vectors",)
    fused: ClassVar[bool] = False
    by_token: ClassVar[bool] = True
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
        if self.fused and native.runs_natively(u, self.vectors):
            return RoutingDecision(*native.top_experts(u, self.vectors, self.k, self.eps))
        if self.fused and triton_gpu.runs_on_triton(u, self.vectors):
            return RoutingDecision(*triton_gpu.top_experts(u, self.vectors, self.k, self.eps))
        return self.chosen(self.affinities(u))

    def chosen(self, affinities: Tensor) -> RoutingDecision:
        experts = highest(affinities, self.k)  # E_t
        return RoutingDecision(experts, affinities.gather(-1, experts).softmax(dim=-1))

    def among(self, u: Tensor, active: Tensor) -> RoutingDecision:
        affinities = self.affinities(u)
        experts, acts = highest_active(affinities, self.k, active)
        chosen = affinities.gather(-1, experts).masked_fill(~acts, -torch.inf)
        return RoutingDecision(experts, chosen.softmax(dim=-1).nan_to_num(0.0))  # nobody acts: 0

    def affinities_of(self, sums: Tensor, n: int) -> Tensor:
        """`affinities` by the `sums` over all n features."""
        raise NotImplementedError

    def decide(self, sums: Tensor, n: int) -> RoutingDecision:
        return self.chosen(self.affinities_of(sums, n))

    def distribution(self, u: Tensor) -> Tensor:
        return self.affinities(u).softmax(dim=-1)


class PhatgooseRouter(TopKRouter):
    """The paper's router at one site; `vectors` are standardised."""

    fused = one_call = True
    eps: float

    def __init__(self, vectors: Tensor, k: int, eps: float) -> None:
        super().__init__(vectors, k)
        self.eps = eps

    def affinities(self, u: Tensor) -> Tensor:
        standardised = functional.layer_norm(u.float(), u.shape[-1:], eps=self.eps)  # ū
        return products(standardised, self.vectors) / math.sqrt(u.shape[-1])
        # The kernels skip the mean: v̄ sums to 0, so v̄ᵀū = v̄ᵀu / √(var u + ε). So do `sums`.

    def sums(self, u: Tensor) -> Tensor:
        """v̄ᵀu, Σ u and Σ u², [T, E + 2]; float64, in which a mean may be far above deviations."""
        exact = u.double()
        moments = (exact.sum(-1, keepdim=True), exact.square().sum(-1, keepdim=True))
        return torch.cat([products(u, self.vectors).double(), *moments], dim=-1)

    def affinities_of(self, sums: Tensor, n: int) -> Tensor:
        product, first, second = torch.split(sums, [sums.shape[-1] - 2, 1, 1], dim=-1)
        variance = (second / n - (first / n).square()).clamp(min=0)
        affinities: Tensor = product / ((variance + self.eps) * n).sqrt()
        return affinities.float()


class ByVectors(Router):
    """The frame of routers that score with one vector per expert."""

    @property
    def form(self) -> Mapping[str, str]:
        return {"vectors": "En"}

    def vectors_at(self, pool: Pool, site: str) -> Tensor:
        """The vectors of the experts of `pool` that act at `site`, ready to score with."""
        raise NotImplementedError

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        vectors, temperature = self.vectors_at(pool, site), getattr(self.config, "temperature", 1.0)
        return {"vectors": vectors if temperature == 1 else vectors / temperature}


class Phatgoose(ByVectors):
    """Router phatgoose, the paper's: standardised gates."""

    vectors: ClassVar[str] = "gates"

    def vectors_at(self, pool: Pool, site: str) -> Tensor:
        return standardise(pool.vectors(self.vectors, site).float())

    def at(self, site: RouterSite) -> SiteRouter:
        return PhatgooseRouter(site.state["vectors"], self.k, self.config.eps)


class AverageActivation(Phatgoose):
    """Router average-activation (paper section 4.2): mean training activations in the gates' place.

    Means are taken over the tokens of the expert's training inputs (`training.statistics`).
    """

    vectors = "means"
