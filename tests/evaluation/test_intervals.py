"""Intervals by resampling beside sums written out, known cases, and what all models must share."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from phatgoose.evaluation.metrics import (
    CONFIDENCE,
    Sample,
    SharedMeans,
    wilson,
)


def matches(*values: float) -> Sample:
    """Answers that are right (1) or wrong (0)."""
    return Sample.of(["accuracy"], [[(value,)] for value in values])


def test_the_interval_is_that_of_a_bootstrap_written_out():
    values = np.random.default_rng(1).random(40)
    interval = matches(*values).estimate()
    generator = np.random.default_rng(7)
    means = [generator.choice(values, 40).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02)
    normal = 1.96 * values.std() / math.sqrt(40)
    assert interval.high - interval.low == pytest.approx(2 * normal, rel=0.1)


def in_rows(values, rows) -> Sample:
    return Sample.of(["accuracy"], [[(value,)] for value in values], rows)


def test_rows_of_several_sizes_count_by_their_examples():
    sample = in_rows([1, 1, 1, 0], [7, 7, 7, 3])
    weights = sample.draws(np.random.default_rng(0), 200)
    assert {tuple(row) for row in weights} == {(1, 1, 1, 1), (2, 2, 2, 0), (0, 0, 0, 2)}
    assert sample.replicates(np.array([(1, 1, 1, 1), (2, 2, 2, 0), (0, 0, 0, 2)])) == pytest.approx(
        [3 / 4, 1, 0], abs=1e-12
    )


def test_intervals_of_rows_in_many_templates_cover_the_truth():
    """Where rows decide much, intervals over examples would cover it in two thirds of the cases."""
    generator, covered, narrow = np.random.default_rng(3), 0, 0
    numbers = np.repeat(np.arange(80), 10).tolist()
    for _ in range(300):
        share = 1 / (1 + np.exp(-2 * generator.standard_normal(80)))  # each row's, 0.5 on average
        values = (generator.random((80, 10)) < share[:, None]).astype(float).reshape(-1)
        sample = in_rows(values, numbers)
        known = wilson(sample.score * sample.independent, sample.independent)
        alone = wilson(values.sum(), 800)
        covered += known.low <= 0.5 <= known.high
        narrow += alone.low <= 0.5 <= alone.high
    assert covered / 300 > 0.92
    assert narrow / 300 < 0.75


# Several datasets


def scored(*means: float, n: int = 200, seed: int = 0) -> list[Sample]:
    """A dataset for each of the means, of n examples with such a share of right answers."""
    generator = np.random.default_rng(seed)
    return [matches(*(generator.random(n) < mean).astype(float)) for mean in means]


def test_a_lead_on_every_example_is_the_same_in_every_resample():
    marks = [np.random.default_rng(d).random(30) / 2 for d in range(4)]
    lower = [matches(*row) for row in marks]
    higher = [matches(*(row + 0.25)) for row in marks]
    replicates = SharedMeans.of({"lower": lower, "higher": higher}).drawn
    np.testing.assert_allclose(replicates["higher"] - replicates["lower"], 0.25, atol=1e-12)


# Shares of right answers


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_that_of_scipy(counts):
    found = wilson(*counts)
    wanted = binomtest(*counts).proportion_ci(CONFIDENCE, method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9, abs=1e-12)
