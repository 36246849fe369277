"""Measures of a routing distribution, as docs/analysis.md states them; all logarithms are natural.

A distribution here is an array [E] of shares that sum to 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import EvaluationError

__all__ = [
    "as_distribution",
    "concentration",
    "effective_experts",
    "entropy",
    "heaviest",
    "load",
    "overlap",
]

Array = NDArray[np.float64]


def as_distribution(values: ArrayLike) -> Array:
    """`values` [.., E] over their sum.

    Raises EvaluationError where they are negative, not finite, or all zero.
    """
    shares = np.asarray(values, float)
    total = shares.sum(axis=-1, keepdims=True)
    if not np.isfinite(shares).all() or (shares < 0).any() or (total <= 0).any():
        raise EvaluationError(
            "Shares of experts must be finite, 0 or more, and not all 0: was nothing recorded?"
        )
    return np.asarray(shares / total)


def entropy(p: ArrayLike) -> float:
    """H(p) = -sum of p ln p, from 0 (one expert) to ln E (all alike)."""
    shares = as_distribution(p)
    present = shares[shares > 0]
    return float(max(0.0, -(present * np.log(present)).sum()))


def effective_experts(p: ArrayLike) -> float:
    """The number of experts that, with equal shares, would have this entropy: exp H(p), 1 to E."""
    return math.exp(entropy(p))


def load(p: ArrayLike) -> Array:
    """E p: each expert's share as a multiple of an even one, [E]."""
    shares = as_distribution(p)
    return np.asarray(shares * shares.shape[-1])


def concentration(p: ArrayLike) -> float:
    """Sum of p² (Herfindahl's index), from 1/E (all alike) to 1 (one expert).

    It is the chance that two tokens drawn at random go to the same expert.
    """
    return float((as_distribution(p) ** 2).sum())


def overlap(p: ArrayLike, q: ArrayLike) -> float:
    """Sum of min(p, q): 1 less the total variation distance; 1 for equals, 0 for strangers."""
    return float(np.minimum(as_distribution(p), as_distribution(q)).sum())


def heaviest(weights: Array, most: int) -> list[int]:
    """The experts of greatest weight [E], at most so many and none of weight 0, best first."""
    ranked = np.argsort(-weights, kind="stable")[:most]
    return [int(z) for z in ranked if weights[z] > 0]
