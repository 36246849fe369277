"""Measures of routing distributions, as docs/analysis.md states them; all logarithms are natural.

A distribution here is an array [E] of shares that sum to 1 (METHOD section 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, pearsonr, spearmanr

from ..errors import EvaluationError
from ..evaluation.intervals import CONFIDENCE, Interval

__all__ = [
    "SMOOTHING",
    "Correlation",
    "as_distribution",
    "concentration",
    "correlation",
    "effective_experts",
    "entropy",
    "kl_divergence",
    "load",
    "overlap",
    "smoothed",
]

SMOOTHING = 0.01  # the share of the uniform distribution that is mixed in before a KL divergence

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


def smoothed(p: ArrayLike, smoothing: float = SMOOTHING) -> Array:
    """(1 - s) p + s/E, so that no share is 0. Raises EvaluationError unless 0 < s < 1."""
    if not 0 < smoothing < 1:
        raise EvaluationError(f"smoothing is {smoothing}, but must be between 0 and 1.")
    shares = as_distribution(p)
    return np.asarray((1 - smoothing) * shares + smoothing / shares.shape[-1])


def kl_divergence(p: ArrayLike, q: ArrayLike, smoothing: float = SMOOTHING) -> float:
    """KL(p ‖ q) = sum of p ln(p/q), both smoothed alike; 0 for equals (METHOD section 7).

    Oracle's distribution has zeros, for which the divergence would be infinite.
    """
    first, second = smoothed(p, smoothing), smoothed(q, smoothing)
    return float(max(0.0, (first * np.log(first / second)).sum()))


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's coefficients over n pairs, with 95 % intervals.

    Pearson's interval is Fisher's (z = artanh r, standard error 1/√(n - 3)); Spearman's the same
    with Bonett and Wright's standard error √((1 + ρ²/2) / (n - 3)). Coefficients are None for fewer
    than three pairs or where one side is constant, intervals for fewer than four.
    """

    n: int
    pearson: float | None = None
    pearson_interval: Interval | None = None
    spearman: float | None = None
    spearman_interval: Interval | None = None


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """How `x` and `y`, pairs in order, go together (METHOD section 7)."""
    first, second = np.asarray(x, float), np.asarray(y, float)
    n = len(first)
    if n < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(n)
    r, rho = _bounded(pearsonr(first, second)), _bounded(spearmanr(first, second))
    return Correlation(
        n, r, _fisher_interval(r, 1, n), rho, _fisher_interval(rho, 1 + rho**2 / 2, n)
    )


def _bounded(result: Any) -> float:
    return float(min(1.0, max(-1.0, result.statistic)))


def _fisher_interval(coefficient: float, variance: float, n: int) -> Interval | None:
    if n < 4:
        return None
    if abs(coefficient) == 1:
        return Interval(coefficient, coefficient)
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance / (n - 3))
    centre = math.atanh(coefficient)
    return Interval(math.tanh(centre - half), math.tanh(centre + half))
