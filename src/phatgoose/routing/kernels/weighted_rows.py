"""Weighted sums of one vector per expert: (IA)³ scalings and biases."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["reference_rows", "weighted_rows"]


def reference_rows(experts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Sum over the chosen z of w_z rows_z for every token, [T, d], as a loop over all experts.

    `experts` [T, k] are indices into `rows` [E, d], `weights` [T, k] theirs.
    """
    total = weights.new_zeros(len(experts), rows.shape[1])
    for z in range(len(rows)):
        w_z = (weights * (experts == z)).sum(dim=-1, keepdim=True)  # [T, 1]
        total = total + w_z * rows[z]
    return total


def weighted_rows(experts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """The same in one operation that fetches each token's rows and keeps none, float32 [T, d]."""
    return functional.embedding_bag(
        experts, rows.float(), per_sample_weights=weights.float(), mode="sum"
    )
