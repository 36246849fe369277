"""Numbers of routing: entropy, and divergence from Oracle.

As docs/analysis.md states them; all logarithms are natural. A distribution here is an array [E] of
shares that sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError
from ..evaluation.metrics import Estimate, Z
from ..routing.routers.fixed import best_expert_by_task
from ..routing.routers.router import Scores

Array = NDArray[np.float64]


def as_distribution(values: ArrayLike) -> Array:
    """`values` [.., E] over their sum; all alike where all are 0, as nobody was preferred."""
    shares = np.asarray(values, float) + (np.sum(values, axis=-1, keepdims=True) == 0)
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def entropy(p: ArrayLike) -> float:
    """H(p) = -sum of p ln p, from 0 (one expert) to ln E (all alike)."""
    shares = as_distribution(p)
    present = shares[shares > 0]
    return float(max(0.0, -(present * np.log(present)).sum()))


def effective_experts(p: ArrayLike) -> float:
    """The number of experts that, with equal shares, would have this entropy: exp H(p), 1 to E."""
    return math.exp(entropy(p))


def concentration(p: ArrayLike) -> float:
    """Sum of p² (Herfindahl): the chance that two tokens drawn at random go to the same expert."""
    return float((as_distribution(p) ** 2).sum())


def heaviest(weights: Array, most: int) -> list[int]:
    """The indices of the greatest weights, greatest first, without those of 0."""
    ranked = np.argsort(-weights, kind="stable")[:most]
    return [int(z) for z in ranked if weights[z] > 0]


def margins(weights: Array) -> Array:
    """By how much each row of `weights` [prompts, E] prefers its first expert to its second."""
    ranked = np.sort(weights, axis=1)
    if weights.shape[1] == 1:
        return ranked[:, 0]
    return ranked[:, -1] - ranked[:, -2]


# Paper section 4.4: Oracle sends all tokens of a dataset to its best single expert. The paper finds
# a Pearson correlation of -0.2 between PHATGOOSE's divergence from Oracle and its score, over
# datasets.

ORACLE = "oracle"
SMOOTHING = 0.01  # the share of the uniform distribution that is mixed in before a KL divergence


def oracle_experts(
    scores: Scores | None, experts: Sequence[str], datasets: Sequence[str]
) -> dict[str, str]:
    """Each dataset's expert of the highest score; {} without scores. Raises ConfigError."""
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


def smoothed(p: ArrayLike) -> Array:
    """(1 - s) p + s/E with s = SMOOTHING, so that no share is 0."""
    shares = as_distribution(p)
    return np.asarray((1 - SMOOTHING) * shares + SMOOTHING / shares.shape[-1])


def kl_divergence(p: ArrayLike, q: ArrayLike) -> float:
    """KL(p ‖ q) = sum of p ln(p/q), both smoothed alike, without which Oracle's zeros make it ∞."""
    first = smoothed(p)
    return float(max(0.0, (first * np.log(first / smoothed(q))).sum()))


@dataclass(frozen=True)
class Divergence:
    """KL divergences between distributions p and q: `to` is KL(p ‖ q), `back` KL(q ‖ p)."""

    to: float
    back: float


@dataclass(frozen=True)
class Correlation:
    """Pearson's coefficient over n pairs, with its 95 % interval.

    By Fisher's z = artanh r, with standard error 1/√(n - 3). The coefficient needs three pairs and
    no constant side; the interval of three is all from -1 to 1.
    """

    n: int
    pearson: Estimate | None = None


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's coefficient of pairs, where there is one (see the class)."""
    first = np.asarray(x, float)
    second = np.asarray(y, float)
    n = len(first)
    if n < 3 or 0 in (np.ptp(first), np.ptp(second)):
        return Correlation(n)
    # Scaled, since squares of the smallest numbers would be 0.
    first = first / np.abs(first).max()
    second = second / np.abs(second).max()
    r = float(np.corrcoef(first, second)[0, 1])
    if n == 3:
        return Correlation(n, Estimate(r, -1, 1))
    if abs(r) == 1:
        return Correlation(n, Estimate(r, r, r))
    centre = math.atanh(r)
    half = Z / math.sqrt(n - 3)
    return Correlation(n, Estimate(r, math.tanh(centre - half), math.tanh(centre + half)))
