"""KL to Oracle: how far a router's distribution is from Oracle's, and how that goes with its score.

Paper section 4.4. Oracle sends all tokens of a dataset to its best single expert. The paper finds a
Pearson correlation of -0.2 between PHATGOOSE's divergence from Oracle and its score, over datasets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, EvaluationError
from ..evaluation.intervals import Interval, Z
from ..routing.routers.scores import Scores, best_expert_by_task
from .measures import as_distribution

__all__ = [
    "ORACLE",
    "SMOOTHING",
    "Correlation",
    "Divergence",
    "correlation",
    "kl_divergence",
    "oracle_distribution",
    "oracle_experts",
    "smoothed",
]

ORACLE = "oracle"
SMOOTHING = 0.01  # the share of the uniform distribution that is mixed in before a KL divergence

Array = NDArray[np.float64]


def oracle_experts(
    scores: Scores | None, experts: Sequence[str], datasets: Sequence[str]
) -> dict[str, str]:
    """The best single expert of each dataset; empty without `scores`.

    Raises ConfigError for a dataset that has no scores.
    """
    if scores is None:
        return {}
    best = best_expert_by_task(scores, experts)
    for dataset in datasets:
        if dataset not in best:
            raise ConfigError(
                f"The scores of single experts don't have task {dataset!r}; they have "
                f"{', '.join(sorted(best))}."
            )
    return {dataset: best[dataset] for dataset in datasets}


def oracle_distribution(expert: str, experts: Sequence[str]) -> Array:
    """Oracle's distribution where it chooses `expert`, [E]."""
    return np.asarray(np.eye(len(experts))[list(experts).index(expert)])


def smoothed(p: ArrayLike, smoothing: float = SMOOTHING) -> Array:
    """(1 - s) p + s/E, so that no share is 0. Raises EvaluationError unless 0 < s < 1."""
    if not 0 < smoothing < 1:
        raise EvaluationError(f"smoothing is {smoothing}, but must be between 0 and 1.")
    shares = as_distribution(p)
    return np.asarray((1 - smoothing) * shares + smoothing / shares.shape[-1])


def kl_divergence(p: ArrayLike, q: ArrayLike, smoothing: float = SMOOTHING) -> float:
    """KL(p ‖ q) = sum of p ln(p/q), both smoothed alike; 0 for equals.

    Without smoothing the divergence from Oracle is infinite, because Oracle's distribution has
    zeros.
    """
    first, second = smoothed(p, smoothing), smoothed(q, smoothing)
    return float(max(0.0, (first * np.log(first / second)).sum()))


@dataclass(frozen=True)
class Divergence:
    """KL divergences between distributions p and q: `to` is KL(p ‖ q), `back` KL(q ‖ p)."""

    to: float
    back: float

    @classmethod
    def between(cls, p: ArrayLike, q: ArrayLike, smoothing: float = SMOOTHING) -> Divergence:
        """The divergences in both directions."""
        return cls(kl_divergence(p, q, smoothing), kl_divergence(q, p, smoothing))


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
    """The correlation of `x` with `y`, which are pairs in order."""
    first, second = np.asarray(x, float), np.asarray(y, float)
    n = len(first)
    if n < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(n)
    r, rho = _pearson(first, second), _pearson(_ranks(first), _ranks(second))
    return Correlation(
        n, r, _fisher_interval(r, 1, n), rho, _fisher_interval(rho, 1 + rho**2 / 2, n)
    )


def _pearson(x: Array, y: Array) -> float:
    """The cosine of what `x` and `y` are beside their means."""
    return min(1.0, max(-1.0, float(_direction(x) @ _direction(y))))


def _direction(values: Array) -> Array:
    scaled = values / np.abs(values).max()  # squares of the smallest numbers would be 0
    centred = scaled - scaled.mean()
    return np.asarray(centred / np.linalg.norm(centred))


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[places])


def _fisher_interval(coefficient: float, variance: float, n: int) -> Interval | None:
    if n < 4:
        return None
    if abs(coefficient) == 1:
        return Interval(coefficient, coefficient)
    half = Z * math.sqrt(variance / (n - 3))
    centre = math.atanh(coefficient)
    return Interval(math.tanh(centre - half), math.tanh(centre + half))
