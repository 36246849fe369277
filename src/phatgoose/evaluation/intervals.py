"""Intervals: how far a score moves with other examples or other datasets.

Shares of right answers have Wilson's interval, everything else one by resampling. A resample
reweights per-example statistics (`evaluation.metrics`). Models scored on the same examples are
resampled alike, so their differences can be compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import metric

__all__ = ["CONFIDENCE", "Interval", "Sample", "Z", "dataset_replicates", "interval_of"]
__all__ += ["wilson_interval"]

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # standard errors to each side of a normal mean
REPLICATES = 2000

Array = NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A range that contains a score with confidence CONFIDENCE."""

    low: float
    high: float


@dataclass(frozen=True)
class Sample:
    """One model's answers to one dataset, as statistics per metric and example.

    `statistics[m]` is [n, s_m] for the metric named `metrics[m]`.
    """

    metrics: tuple[str, ...]
    statistics: tuple[Array, ...]

    @classmethod
    def of(cls, metrics: Sequence[str], marks: Sequence[Sequence[Sequence[float]]]) -> Sample:
        """The sample of examples with `marks` (example, metric, statistic)."""
        by_metric = [np.array([row[m] for row in marks], float) for m in range(len(metrics))]
        return cls(tuple(metrics), tuple(by_metric))

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.statistics[0])

    @property
    def by_metric(self) -> dict[str, float]:
        """The score in each metric."""
        ones = np.ones((1, self.n))
        return {
            name: float(metric(name).combine(ones @ rows, self.n)[0])
            for name, rows in zip(self.metrics, self.statistics, strict=True)
        }

    @property
    def score(self) -> float:
        """The mean over the metrics."""
        return float(self.replicates(np.ones((1, self.n)))[0])

    def replicates(self, weights: Array) -> Array:
        """The score with each example counted `weights` [B, n] times (rows sum to n), [B]."""
        columns = [
            metric(name).combine(weights @ rows, self.n)
            for name, rows in zip(self.metrics, self.statistics, strict=True)
        ]
        return np.asarray(np.mean(columns, axis=0))

    def interval(self, seed: int = 0) -> Interval:
        """The percentile interval over examples drawn anew with replacement."""
        return interval_of(self.replicates(_draws(np.random.default_rng(seed), REPLICATES, self.n)))


def _draws(generator: np.random.Generator, replicates: int, n: int) -> Array:
    """How often each of n examples is drawn in n draws with replacement, [replicates, n]."""
    return generator.multinomial(n, np.full(n, 1 / n), size=replicates).astype(float)


def dataset_replicates(
    samples: Mapping[str, Sequence[Sample]], *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Array]:
    """For each model the mean over datasets in so many resamples, [replicates].

    `samples[model]` has one sample per dataset, the same datasets and examples for all models. A
    resample draws the datasets with replacement, and for every dataset drawn its examples, so it
    covers both the choice of datasets and that of examples. All models share the draws.
    """
    generator = np.random.default_rng(seed)
    count = len(next(iter(samples.values())))
    drawn = generator.integers(count, size=(replicates, count))  # which dataset in which slot
    values = {model: np.zeros((replicates, count)) for model in samples}
    for dataset in range(count):
        slots = drawn == dataset
        if not slots.any():
            continue
        n = next(iter(samples.values()))[dataset].n
        weights = _draws(generator, int(slots.sum()), n)
        for model, rows in samples.items():
            values[model][slots] = rows[dataset].replicates(weights)
    return {model: rows.mean(axis=1) for model, rows in values.items()}


def interval_of(values: Array) -> Interval:
    """The percentile interval of resampled `values` [replicates]."""
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [outside, 100 - outside])
    return Interval(float(low), float(high))


def wilson_interval(right: int, n: int) -> Interval:
    """Wilson's score interval (1927) for `right` of `n` answers, without continuity correction."""
    share, narrowed = right / n, 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / narrowed
    half = Z / narrowed * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Interval(0.0 if right == 0 else centre - half, 1.0 if right == n else centre + half)
