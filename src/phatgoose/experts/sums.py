"""Sums over the experts that each token chose, which kernels and stacks share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dense_weights(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    """The weights [T, k] of the chosen `experts` [T, k] as weights of all, [T, count]."""
    return weights.new_zeros(len(experts), count).scatter_add(1, experts, weights)


def weighted_rows(experts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Sum over the chosen z [T, k] of w_z rows_z, float32 [T, d], for `rows` [E, d]."""
    # One operation, which keeps no [T, k, d] of each token's rows.
    return functional.embedding_bag(
        experts, rows.float(), per_sample_weights=weights.float(), mode="sum"
    )


def is_one_call(*factors: Tensor) -> bool:
    """True where torch has the products for factors [E, n, m]: bfloat16, n and m multiples of 8."""
    if not hasattr(functional, "grouped_mm"):
        return False
    for factor in factors:
        _, n, m = factor.shape
        is_aligned = n % 8 == 0 and m % 8 == 0
        if factor.dtype is not torch.bfloat16 or not is_aligned:
            return False
    return True


def expert_products(rows: Tensor, factors: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] of `rows` [.., n] times factors[0] [n, m], the next times the next."""
    if is_one_call(factors):
        return functional.grouped_mm(rows, factors, offs=counts.cumsum(0).to(torch.int32))
    # Counts are read back, which waits for a GPU.
    parts = torch.split(rows, counts.tolist())
    return torch.cat([part @ factor for part, factor in zip(parts, factors, strict=True)])
