"""The routed product in plain torch, and mttl's product of mixed factors.

Arguments and shapes as `kernels.choice` has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .weighted_rows import dense_weights

__all__ = ["concat", "gather", "mixed_factors", "reference"]


def reference(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Sum over z in E_t of w_z B_z A_z u_t for every token t, [T, d] (paper, section 3).

    The oracle of all other kernels. One product per expert, over all tokens, weighted by zero where
    the expert was not chosen.
    """
    delta = torch.zeros(u.shape[0], B.shape[2], dtype=u.dtype, device=u.device)
    for z in range(A.shape[0]):
        w_z = (weights * (experts == z)).sum(dim=-1, keepdim=True)  # [T, 1]
        delta = delta + w_z.to(u.dtype) * (u @ A[z].T @ B[z])
    return delta


def concat(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product through the concatenated rank space: two large products.

    A u is computed for all E experts at once ([T, E r]), scaled by each token's weights (zero for
    experts not chosen) and multiplied with all B at once. Static shapes; best for many tokens.
    """
    E, r, n = A.shape
    tokens = u.shape[0]
    dense = dense_weights(experts, weights, E)
    inner = (u @ A.reshape(E * r, n).T).view(tokens, E, r)
    inner = inner * dense.to(u.dtype).unsqueeze(-1)
    return inner.view(tokens, E * r) @ B.reshape(E * r, -1)


def gather(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product through each token's own factors, fetched: for short inputs.

    The k chosen experts of a token are stacked to one LoRA of rank k r. Static shapes.
    """
    tokens, k = experts.shape
    _, r, n = A.shape
    chosen_A = A[experts].view(tokens, k * r, n)
    chosen_B = B[experts].view(tokens, k * r, B.shape[2])
    inner = chosen_A @ u.unsqueeze(-1)  # [T, k r, 1]
    inner = inner.view(tokens, k, r) * weights.to(u.dtype).unsqueeze(-1)
    return (inner.view(tokens, 1, k * r) @ chosen_B).squeeze(1)


def mixed_factors(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(sum over z of w_z B_z)(sum over z of w_z A_z) u for every token, [T, d].

    Shapes as those of kernels, but this is another function: the products B_z A_y of
    different experts take part, so that the result depends on the basis of each expert's rank
    space. It exists to compare with mttl (`arrow="mttl"`).
    """
    E, r, n = A.shape
    tokens = u.shape[0]
    dense = dense_weights(experts, weights, E).to(u.dtype)
    inner = (u @ A.reshape(E * r, n).T).view(tokens, E, r)
    mixed = (dense.unsqueeze(1) @ inner).squeeze(1)  # [T, r]
    outer = dense.unsqueeze(-1) * mixed.unsqueeze(1)  # [T, E, r]
    return outer.view(tokens, E * r) @ B.reshape(E * r, -1)
