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
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, replicates: Array) -> Estimate:
        """`value` with the middle CONFIDENCE of its bootstrap `replicates`."""
        outside = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(replicates, [outside, 100 - outside])
        return cls(float(value), float(low), float(high))

    @property
    def in_per_cent(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    @property
    def in_points(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True, eq=False)
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

    def estimate(self, seed: int = 0) -> Estimate:
        draws = self.draws(np.random.default_rng(seed), REPLICATES)
        return Estimate.of(self.score, self.replicates(draws))

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

    `drawn` [replicates] are a model's means in resamples of datasets and, within them, of examples.
    All models share these, so their differences are intervals in pairs.
    """

    value: Mapping[str, float]
    drawn: Mapping[str, Array]

    @classmethod
    def of(
        cls, samples: Mapping[str, Sequence[Sample]], replicates: int = REPLICATES
    ) -> SharedMeans:
        """The means of models, whose samples are of the same datasets and examples."""
        generator, (some, *_) = np.random.default_rng(0), samples.values()
        slots = generator.integers(len(some), size=(replicates, len(some)))  # which dataset each is
        drawn = {model: np.zeros((replicates, len(some))) for model in samples}
        for dataset in range(len(some)):
            here = slots == dataset
            if not here.any():
                continue
            # All models get the same weights: their differences are intervals in pairs.
            weights = some[dataset].draws(generator, int(here.sum()))
            for model, each in samples.items():
                drawn[model][here] = each[dataset].replicates(weights)
        value = {name: sum(s.score for s in each) / len(each) for name, each in samples.items()}
        return cls(value, {model: rows.mean(axis=1) for model, rows in drawn.items()})

    def estimate(self, model: str) -> Estimate:
        return Estimate.of(self.value[model], self.drawn[model])

    def gain(self, model: str, over: str) -> Estimate:
        """The difference of two models' means, with its interval in pairs."""
        return Estimate.of(
            self.value[model] - self.value[over], self.drawn[model] - self.drawn[over]
        )


def wilson(right: float, n: float) -> Estimate:
    """The share `right` of `n`, with Wilson's interval (1927) without continuity correction."""
    share, narrowed = right / n, 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / narrowed
    half = Z / narrowed * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # Exact at the ends, where rounding could leave the range.
    low, high = centre - half, centre + half
    return Estimate(share, 0.0 if right == 0 else low, 1.0 if right == n else high)
