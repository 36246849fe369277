"""Arrow: an expert's vector is the direction in which it stretches its input most.

Ostapenko et al. 2024; Muqeeth et al. 2024, section 4.2. The vector is the first right singular
vector of B A, found without forming the d x n product: with Aᵀ = Q R, B A = (B Rᵀ) Qᵀ, so the SVD
of the small d x r matrix B Rᵀ gives it; a second QR makes that r x r. The k experts with the
highest |vᵀu| act, weighted by the softmax of these numbers over those k.

Forms, chosen by the setting `form`:
    svd   exact vectors, top k, outputs mixed: the paper's form, and the default
    peft  as peft's create_arrow_model: 15 steps of power iteration from a random start, which may
          stop short of the exact vector when two singular values are close
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from ...experts.lora import Factors
from ...experts.pool import Pool
from .phatgoose import Temperature
from .router import ABSOLUTE, Router, RouterAtSite, products

POWER_STEPS = 15
SMALLEST = 1e-8


@dataclass(frozen=True)
class Arrow(Router):
    """Router arrow."""

    name = "arrow"
    label = "Arrow"
    needs = ("lora",)
    usual_k = 2
    sizes = {"vectors": "En"}  # noqa: RUF012
    fused = ABSOLUTE

    form: Annotated[Literal["svd", "peft"], "The variant: svd (the paper's) or peft."] = "svd"
    temperature: Temperature = 1.0

    def table(self, pool: Pool, site: str) -> dict[str, Tensor]:
        vectors = []
        for expert in pool.experts:
            if site in expert.lora:
                vectors.append(arrow_vector(expert.lora[site], self.form))
        return {"vectors": torch.stack(vectors) / self.temperature}

    def scores(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        return products(u, at_site.vectors).abs()


def arrow_vector(lora: Factors, form: str = "svd") -> Tensor:
    """The unit vector of one expert at one site, float32 [n]; zeros if the update is zero."""
    A = lora.A.float()
    B = lora.B.float()
    if form == "peft":
        return _power_iteration(A, B)
    small = small_svd(A, B)
    direction = small.V[0] if small.values[0] > 0 else torch.zeros_like(small.V[0])
    return torch.mv(small.Q, direction).float()


class SmallSVD(NamedTuple):
    """The right half of an SVD of B A [d, n] of rank r, float64: its right vectors are V Qᵀ.

    `values` [r], largest first; `V` [r, r] orthogonal; `Q` [n, r] with orthonormal columns.
    """

    values: Tensor
    V: Tensor
    Q: Tensor


def small_svd(A: Tensor, B: Tensor) -> SmallSVD:
    """The SVD of BA through QR of both factors, in float64: no matrix [d, n] is made."""
    Q, R = torch.linalg.qr(A.double().T)  # [n, r], [r, r]
    small = torch.linalg.qr(B.double(), mode="r").R @ R.T  # [r, r]
    _, values, V = torch.linalg.svd(small)
    return SmallSVD(values, V, Q)


def _power_iteration(A: Tensor, B: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vector: Tensor = torch.randn(A.shape[1], generator=generator)
    vector = vector / (vector.norm() + SMALLEST)
    inner = B.T @ B
    for _ in range(POWER_STEPS):
        vector = A.T @ (inner @ (A @ vector))
        vector = vector / (vector.norm() + SMALLEST)
    return vector
