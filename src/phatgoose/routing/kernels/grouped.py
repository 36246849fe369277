"""Tokens sorted by expert, then one product per expert: for many tokens and many experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["expert_products", "grouped", "is_one_call"]


def grouped(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product of `kernels.choice` over tokens sorted by expert, [T, d].

    Multiplies what was chosen and nothing else. On GPUs all experts' products are one call of
    `torch.nn.functional.grouped_mm`, and nothing waits for the device; where torch has none for the
    type or the sizes at hand, they are one call each, and counts are read back.
    """
    tokens, k = experts.shape
    chosen = experts.reshape(-1)  # [T k]
    order = chosen.argsort(stable=True)
    counts = torch.zeros(len(A), dtype=torch.int64, device=u.device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
    inner = expert_products(u[order // k], A.transpose(1, 2), counts)  # [T k, r]
    inner = inner * weights.reshape(-1, 1)[order].to(u.dtype)
    outer = expert_products(inner, B, counts)  # [T k, d]
    return outer[order.argsort()].view(tokens, k, B.shape[2]).sum(dim=1)


def is_one_call(*factors: Tensor) -> bool:
    """True where torch has the products for factors [E, n, m]: bfloat16, n and m multiples of 8."""
    return hasattr(functional, "grouped_mm") and all(
        f.dtype is torch.bfloat16 and not any(size % 8 for size in f.shape[1:]) for f in factors
    )


def expert_products(rows: Tensor, factors: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] of `rows` [.., n] times factors[0] [n, m], the next times the next."""
    if is_one_call(factors):
        return functional.grouped_mm(rows, factors, offs=counts.cumsum(0).to(torch.int32))
    parts = torch.split(rows, counts.tolist())
    return torch.cat([part @ factor for part, factor in zip(parts, factors, strict=True)])
