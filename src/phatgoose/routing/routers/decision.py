"""What every router answers, experts and weights for each token, and the rule for ties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RoutingDecision", "highest"]


@dataclass(frozen=True)
class RoutingDecision:
    """The experts chosen for each of T tokens, best first where there is a best.

    `experts` [T, k] are rows of the site's stack, `weights` [T, k] float32. They sum to 1, or to
    less for looked-up and merged experts of which some do not act at the site.
    """

    experts: Tensor
    weights: Tensor


def highest(scores: Tensor, k: int) -> Tensor:
    """Where the k highest of each row of `scores` [T, E] are, highest first: int64 [T, k].

    Of equals the first wins, which `torch.topk` doesn't promise; the kernels in C++ and Triton keep
    the same rule. The maximum, twice, of a thousand scores costs what topk does; sorting them costs
    thirty times as much, and pays only for many of few.
    """
    if k * k > 4 * scores.shape[-1]:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    left = scores.detach()
    if k > 1:  # experts that are out of the question (-inf) stay before those that are taken
        left = left.clamp(min=torch.finfo(left.dtype).min)
    chosen: list[Tensor] = []
    for _ in range(k):
        if chosen:
            left = left.scatter(-1, chosen[-1], -torch.inf)
        chosen.append(left.argmax(dim=-1, keepdim=True))
    return torch.cat(chosen, dim=-1)
