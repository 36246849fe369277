"""The routed product as a loop that reads like the paper: the oracle of all other kernels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Sum over z in E_t of w_z B_z A_z u_t for every token t, [T, d] (METHOD section 4).

    Shapes as in `kernels.choice`. One product per expert, over all tokens, weighted by zero
    where the expert was not chosen.
    """
    delta = torch.zeros(u.shape[0], B.shape[2], dtype=u.dtype, device=u.device)
    for z in range(A.shape[0]):
        w_z = (weights * (experts == z)).sum(dim=-1, keepdim=True)  # [T, 1]
        delta = delta + w_z.to(u.dtype) * (u @ A[z].T @ B[z])
    return delta
