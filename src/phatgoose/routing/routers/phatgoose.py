"""PHATGOOSE's router, the paper's section 3 (Muqeeth et al. 2024), and average activation.

For a token's activation u [n] at a site, and the gates v_z [n] of the E experts that act there:

    v̄_z = (v_z − mean v_z) / std v_z         once, when the pool is composed        standardise
    ū   = (u − mean u) / √(var u + ε)                                               scores
    α_z = v̄_zᵀ ū                                                                    scores
    E_t = the k experts with the highest α                                          router.decision
    w_z = softmax of α_z / √n over E_t                                              router.decision
    y   = W u + Σ_{z ∈ E_t} w_z B_z A_z u                                           routing.layers

Means and deviations are over the n features. ε = 1e-5 is that of the released code's LayerNorm; the
paper has none. The code takes the softmax over all experts, then cuts it to k and renormalises:
the same function. A gate's sigmoid and norm play no part, only its direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ...config import POSITIVE
from ...experts.pool import Pool
from .router import STANDARDISED, Router, RouterAtSite, products

# A vector that differs from a constant by less than this share of its largest entry (or whose
# largest entry is below SMALLEST) has no direction worth the name: it is float32 noise.
ROUNDING = 1e-6
SMALLEST = 1e-8

Eps = Annotated[float, "Added to var(u) under the root when standardising activations u.", POSITIVE]
Temperature = Annotated[float, "Divides scores before the softmax.", POSITIVE]


def standardise(vectors: Tensor) -> Tensor:
    """v̄ of each row of `vectors` [E, n], float32; zeros for a constant row, an untrained gate."""
    exact = vectors.double()
    variance, mean = torch.var_mean(exact, dim=-1, correction=0, keepdim=True)
    deviation = variance.sqrt()
    # A clamp and no ε under the root, which would damp gates that were trained little.
    noise = ROUNDING * vectors.abs().amax(dim=-1, keepdim=True).double().clamp(min=SMALLEST)
    centred = exact.sub_(mean).div_(deviation.clamp(min=noise))
    return centred.masked_fill_(deviation <= noise, 0.0).float()


def affinities(u: Tensor, vectors: Tensor, eps: float) -> Tensor:
    """α/√n of tokens u [T, n] and standardised `vectors` [E, n], float32 [T, E]."""
    standardised = functional.layer_norm(u.float(), u.shape[-1:], eps=eps)  # ū
    return products(standardised, vectors) / math.sqrt(u.shape[-1])


@dataclass(frozen=True)
class Phatgoose(Router):
    """Router phatgoose, the paper's: standardised gates."""

    name = "phatgoose"
    label = "PHATGOOSE"
    needs = ("gates",)
    usual_k = 2
    sizes = {"vectors": "En"}  # noqa: RUF012
    fused = STANDARDISED
    # The kernels skip the mean of u: v̄ sums to 0, so v̄ᵀū = v̄ᵀu / √(var u + ε).

    eps: Eps = 1e-5
    temperature: Temperature = 1.0

    def table(self, pool: Pool, site: str) -> dict[str, Tensor]:
        vectors = standardise(pool.vectors(self.needs[0], site).float())
        return {"vectors": vectors / self.temperature}

    def scores(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        return affinities(u, at_site.vectors, self.eps)


@dataclass(frozen=True)
class AverageActivation(Phatgoose):
    """Router average-activation (paper section 4.2): mean training activations in the gates' place.

    Means are taken over the tokens of the expert's training inputs (`training.train_expert`).
    """

    name = "average-activation"
    label = "Average Activation"
    needs = ("means",)
