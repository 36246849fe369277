"""Intervals: how far a score moves with other examples or other datasets.

Shares of right answers have Wilson's interval, everything else one by resampling. A resample
reweights per-example statistics (`evaluation.metrics`). Models scored on the same examples are
resampled alike, so their differences can be compared in pairs. Examples that were made of one row
of a dataset, in several templates, are not independent: rows are drawn instead of examples, and
Wilson's interval counts as many examples as would be worth as much if they were.
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

    `statistics[m]` is [n, s_m] for the metric named `metrics[m]`. `rows` [n] numbers from 0 on the
    rows that the examples were made of; None where each has its own.
    """

    metrics: tuple[str, ...]
    statistics: tuple[Array, ...]
    rows: Array | None = None

    @classmethod
    def of(
        cls,
        metrics: Sequence[str],
        marks: Sequence[Sequence[Sequence[float]]],
        rows: Sequence[int | None] | None = None,
    ) -> Sample:
        """The sample of examples with `marks` (example, metric, statistic), made of `rows`."""
        by_metric = [np.array([row[m] for row in marks], float) for m in range(len(metrics))]
        return cls(tuple(metrics), tuple(by_metric), _numbered(rows))

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
        """The score with each example counted `weights` [B, n] times, [B].

        Weights are whole numbers, as BLEU needs them; rows may sum to other numbers than n.
        """
        counted = weights.sum(axis=1)
        columns = [
            metric(name).combine(weights @ rows, counted)
            for name, rows in zip(self.metrics, self.statistics, strict=True)
        ]
        return np.asarray(np.mean(columns, axis=0))

    def interval(self, seed: int = 0) -> Interval:
        """The percentile interval over examples (or rows) drawn anew with replacement."""
        return interval_of(self.replicates(self.draws(np.random.default_rng(seed), REPLICATES)))

    def draws(self, generator: np.random.Generator, replicates: int) -> Array:
        """How often each example comes in so many draws with replacement, [replicates, n].

        As many are drawn as there are: examples, or rows with all of their examples. A draw of rows
        of several sizes has more or fewer examples than there are, and its score is theirs.
        """
        count = self.n if self.rows is None else int(self.rows.max()) + 1
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=replicates)
        return np.asarray(drawn if self.rows is None else drawn[:, self.rows], float)

    @property
    def independent(self) -> float:
        """So many independent examples would tell the mean of the first statistic as well.

        n where each example has its own row, else p(1-p) over the variance of the mean p of values
        from 0 to 1, estimated over rows (Kish 1965); the number of rows where all values are equal.
        """
        if self.rows is None:
            return float(self.n)
        values, count = self.statistics[0][:, 0], int(self.rows.max()) + 1
        share = values.mean()
        of_rows = np.bincount(self.rows, values - share)
        variance = count / max(count - 1, 1) * np.square(of_rows).sum() / self.n**2
        spread = share * (1 - share)
        return float(min(spread / variance, self.n)) if spread and variance else float(count)


def _numbered(rows: Sequence[int | None] | None) -> Array | None:
    """`rows` numbered from 0 on; None where each example has its own, or none is known."""
    if rows is None or None in rows or len(set(rows)) == len(rows):
        return None
    return np.asarray(np.unique(np.array(rows), return_inverse=True)[1])


def dataset_replicates(
    samples: Mapping[str, Sequence[Sample]], *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Array]:
    """For each model the mean over datasets in so many resamples, [replicates].

    `samples[model]` has one sample per dataset, the same datasets and examples for all models. A
    resample draws the datasets with replacement, and for every dataset drawn its examples (or
    rows), so it covers both the choice of datasets and that of examples. All models share the
    draws.
    """
    generator = np.random.default_rng(seed)
    count = len(next(iter(samples.values())))
    drawn = generator.integers(count, size=(replicates, count))  # which dataset in which slot
    values = {model: np.zeros((replicates, count)) for model in samples}
    for dataset in range(count):
        slots = drawn == dataset
        if not slots.any():
            continue
        weights = next(iter(samples.values()))[dataset].draws(generator, int(slots.sum()))
        for model, rows in samples.items():
            values[model][slots] = rows[dataset].replicates(weights)
    return {model: rows.mean(axis=1) for model, rows in values.items()}


def interval_of(values: Array) -> Interval:
    """The percentile interval of resampled `values` [replicates]."""
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [outside, 100 - outside])
    return Interval(float(low), float(high))


def wilson_interval(right: float, n: float) -> Interval:
    """Wilson's score interval (1927) for `right` of `n` answers, without continuity correction."""
    share, narrowed = right / n, 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / narrowed
    half = Z / narrowed * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Interval(0.0 if right == 0 else centre - half, 1.0 if right == n else centre + half)
