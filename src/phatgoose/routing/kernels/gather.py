"""Only the chosen experts' factors, fetched per token: for decoding and other short inputs."""

from __future__ import annotations

from torch import Tensor

__all__ = ["gather"]


def gather(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product of `kernels.choice` through each token's own factors, [T, d].

    The k chosen experts of a token are stacked to one LoRA of rank k r. Static shapes.
    """
    tokens, k = experts.shape
    _, r, n = A.shape
    chosen_A = A[experts].view(tokens, k * r, n)
    chosen_B = B[experts].view(tokens, k * r, B.shape[2])
    inner = chosen_A @ u.unsqueeze(-1)  # [T, k r, 1]
    inner = inner.view(tokens, k, r) * weights.to(u.dtype).unsqueeze(-1)
    return (inner.view(tokens, 1, k * r) @ chosen_B).squeeze(1)
