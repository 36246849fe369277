"""Kernels in plain torch. Arguments, shapes and letters as in `kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.sums import dense_weights, expert_products


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
    """The routed product through the concatenated rank space, [T, E r]: two large products."""
    E, r, n = A.shape
    tokens = u.shape[0]
    dense = dense_weights(experts, weights, E)
    inner = (u @ A.reshape(E * r, n).T).view(tokens, E, r)
    # Weights go where it is smallest: E r numbers a token, not d.
    inner = inner * dense.to(u.dtype).unsqueeze(-1)
    return inner.view(tokens, E * r) @ B.reshape(E * r, -1)


def gather(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product through each token's own factors, stacked to one LoRA of rank k r."""
    tokens, k = experts.shape
    _, r, n = A.shape
    chosen_A = A[experts].view(tokens, k * r, n)
    chosen_B = B[experts].view(tokens, k * r, B.shape[2])
    inner = chosen_A @ u.unsqueeze(-1)  # [T, k r, 1]
    inner = inner.view(tokens, k, r) * weights.to(u.dtype).unsqueeze(-1)
    return (inner.view(tokens, 1, k * r) @ chosen_B).squeeze(1)


def grouped(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product over tokens sorted by expert, [T, d]: what was chosen, nothing else.

    Where torch has no `grouped_mm` for type and sizes, counts are read back, which waits for a GPU.
    """
    tokens, k = experts.shape
    chosen = experts.reshape(-1)  # [T k]
    # Stable, so that sums don't depend on how equal keys happen to be ordered.
    order = chosen.argsort(stable=True)
    counts = torch.zeros(len(A), dtype=torch.int64, device=u.device)
    # Not bincount: that reads the largest index back, which waits for a GPU.
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
    inner = expert_products(u[order // k], A.transpose(1, 2), counts)  # [T k, r]
    inner = inner * weights.reshape(-1, 1)[order].to(u.dtype)
    outer = expert_products(inner, B, counts)  # [T k, d]
    # The inverse of the order, and not index_add, whose sums on GPUs have no fixed order.
    return outer[order.argsort()].view(tokens, k, B.shape[2]).sum(dim=1)
