"""Intervals: how far a score moves with other examples or other datasets.

Shares of right answers have Wilson's interval, everything else one by resampling per-example
statistics (`evaluation.metrics`). Models scored on the same examples share their resamples, so
their differences are compared in pairs. Examples made of one row of a dataset, in several
templates, are not independent: rows are drawn, and Wilson's interval counts the effective number.
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
TINY = 1e-12

Array = NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Sample:
    """One model's answers to one dataset, as statistics per metric and example.

    `statistics[m]` is [n, s_m] for `metrics[m]`. `rows` [n] numbers the rows that the examples were
    made of, from 0; None if each has its own.
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
        numbers = None
        if rows is not None and None not in rows and len(set(rows)) < len(rows):
            numbers = np.asarray(np.unique(np.array(rows), return_inverse=True)[1])
        return cls(tuple(metrics), tuple(by_metric), numbers)

    @property
    def n(self) -> int:
        return len(self.statistics[0])

    @property
    def by_metric(self) -> dict[str, float]:
        scores = self._scores(np.ones((1, self.n)))
        return {name: float(score[0]) for name, score in zip(self.metrics, scores, strict=True)}

    @property
    def score(self) -> float:
        """The mean over the metrics."""
        return float(self.replicates(np.ones((1, self.n)))[0])

    def replicates(self, weights: Array) -> Array:
        """The score with examples counted `weights` [B, n] times, whole numbers for BLEU: [B]."""
        return np.asarray(np.mean(self._scores(weights), axis=0))

    def _scores(self, weights: Array) -> list[Array]:
        counted = weights.sum(axis=1)
        return [
            metric(name).combine(weights @ rows, counted)
            for name, rows in zip(self.metrics, self.statistics, strict=True)
        ]

    def interval(self, seed: int = 0) -> Interval:
        return interval_of(self.replicates(self.draws(np.random.default_rng(seed), REPLICATES)))

    def draws(self, generator: np.random.Generator, replicates: int) -> Array:
        """How often each draw with replacement has each example (or row), [replicates, n]."""
        count = self.n if self.rows is None else int(self.rows.max()) + 1
        # A row brings all its examples, so if rows differ in size, draws differ in number.
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=replicates)
        return np.asarray(drawn if self.rows is None else drawn[:, self.rows], float)

    @property
    def independent(self) -> float:
        """The number of independent examples with the same information on the first statistic.

        n if each example has its own row, else p(1-p) over the variance of the mean p of values
        from 0 to 1, estimated over rows (Kish 1965), and n at most. The number of rows if all
        values are equal, or if there is one row.
        """
        if self.rows is None:
            return float(self.n)
        values, count = self.statistics[0][:, 0], int(self.rows.max()) + 1
        share = values.mean()
        of_rows = np.bincount(self.rows, values - share)
        variance = count / max(count - 1, 1) * np.square(of_rows).sum() / self.n**2
        spread = share * (1 - share)
        if count == 1 or not spread:
            return float(count)
        # Where all rows have the same mean, their variance is 0 but for rounding.
        return float(min(spread / variance, self.n)) if variance > TINY else float(self.n)


@dataclass(frozen=True)
class SharedMeans:
    """Models' means over the same datasets, each dataset as much as any other.

    `drawn` [REPLICATES] are a model's means in resamples of datasets and, within them, of examples.
    All models share these, so their differences are intervals in pairs.
    """

    value: Mapping[str, float]
    drawn: Mapping[str, Array]

    @classmethod
    def of(cls, samples: Mapping[str, Sequence[Sample]]) -> SharedMeans:
        """The means of models, whose samples are of the same datasets and examples."""
        value = {name: sum(s.score for s in each) / len(each) for name, each in samples.items()}
        return cls(value, dataset_replicates(samples))

    def interval(self, model: str) -> Interval:
        return interval_of(self.drawn[model])

    def gain(self, model: str, over: str) -> tuple[float, Interval]:
        """(the difference of two models' means, its interval in pairs)."""
        between = interval_of(self.drawn[model] - self.drawn[over])
        return self.value[model] - self.value[over], between


def dataset_replicates(
    samples: Mapping[str, Sequence[Sample]], *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Array]:
    """Each model's mean over datasets in each resample, [replicates] by model.

    All models have the same datasets and examples, and share the draws.
    """
    generator = np.random.default_rng(seed)
    count = len(next(iter(samples.values())))
    drawn = generator.integers(count, size=(replicates, count))  # which dataset in which slot
    values = {model: np.zeros((replicates, count)) for model in samples}
    for dataset in range(count):
        slots = drawn == dataset
        if not slots.any():
            continue
        # All models get the same weights: their differences are intervals in pairs.
        weights = next(iter(samples.values()))[dataset].draws(generator, int(slots.sum()))
        for model, rows in samples.items():
            values[model][slots] = rows[dataset].replicates(weights)
    return {model: rows.mean(axis=1) for model, rows in values.items()}


def interval_of(values: Array) -> Interval:
    """The middle CONFIDENCE of bootstrap replicates."""
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [outside, 100 - outside])
    return Interval(float(low), float(high))


def wilson_interval(right: float, n: float) -> Interval:
    """Wilson's score interval (1927) for `right` of `n` answers, without continuity correction."""
    share, narrowed = right / n, 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / narrowed
    half = Z / narrowed * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # Exact at the ends, where rounding could leave the range.
    return Interval(0.0 if right == 0 else centre - half, 1.0 if right == n else centre + half)
