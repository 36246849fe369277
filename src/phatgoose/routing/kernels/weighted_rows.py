"""Weights of chosen experts, and weighted sums of one vector per expert: scalings, biases."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["dense_weights", "reference_rows", "weighted_rows"]


def dense_weights(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    """The weights [T, k] of the chosen `experts` [T, k] as weights of all, [T, count]."""
    return weights.new_zeros(len(experts), count).scatter_add(1, experts, weights)


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
