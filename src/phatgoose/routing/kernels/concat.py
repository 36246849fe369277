"""All experts' factors side by side: two large products, whatever was chosen."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["concat"]


def concat(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product of `kernels.choice` through the concatenated rank space, [T, d].

    A u is computed for all E experts at once ([T, E r]), scaled by each token's weights (zero for
    experts not chosen) and multiplied with all B at once. Static shapes; best for many tokens.
    """
    E, r, n = A.shape
    tokens = u.shape[0]
    dense = torch.zeros(tokens, E, dtype=weights.dtype, device=u.device)
    dense = dense.scatter_add(1, experts, weights)  # [T, E]
    inner = (u @ A.reshape(E * r, n).T).view(tokens, E, r)
    inner = inner * dense.to(u.dtype).unsqueeze(-1)
    return inner.view(tokens, E * r) @ B.reshape(E * r, -1)
