"""Factors mixed before their product: mttl's form of a routed LoRA, another function than ours."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mixed_factors"]


def mixed_factors(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(sum over z of w_z B_z)(sum over z of w_z A_z) u for every token, [T, d].

    Shapes as in `kernels.choice`, but this is none of its kernels: the products B_z A_y of
    different experts take part, so that the result depends on the basis of each expert's rank
    space. It exists to compare with mttl (`arrow="mttl"`).
    """
    E, r, n = A.shape
    tokens = u.shape[0]
    dense = torch.zeros(tokens, E, dtype=weights.dtype, device=u.device)
    dense = dense.scatter_add(1, experts, weights).to(u.dtype)  # [T, E]
    inner = (u @ A.reshape(E * r, n).T).view(tokens, E, r)
    mixed = (dense.unsqueeze(1) @ inner).squeeze(1)  # [T, r]
    outer = dense.unsqueeze(-1) * mixed.unsqueeze(1)  # [T, E, r]
    return outer.view(tokens, E * r) @ B.reshape(E * r, -1)
