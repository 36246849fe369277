"""Measures of routing distributions, and correlations, compared to scipy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from scipy.stats import pearsonr

from phatgoose.analysis.measures import (
    as_distribution,
    correlation,
    entropy,
    kl_divergence,
    smoothed,
)

share = st.floats(0, 1, allow_subnormal=False)


def distributions(size):
    rows = st.lists(share, min_size=size, max_size=size)
    return rows.filter(lambda row: sum(row) > 1e-3).map(as_distribution)


def test_where_nothing_was_preferred_all_are_alike():
    np.testing.assert_array_equal(as_distribution([[0, 0], [3, 1]]), [[0.5, 0.5], [0.75, 0.25]])


two = st.integers(2, 12).flatmap(lambda n: st.tuples(distributions(n), distributions(n)))


@given(two)
def test_entropies_and_divergences_are_those_of_scipy(pair):
    p, q = pair
    assert entropy(p) == pytest.approx(scipy_entropy(p), abs=1e-9)
    wanted = scipy_entropy(smoothed(p), smoothed(q))
    assert kl_divergence(p, q) == pytest.approx(wanted, abs=1e-9)


@given(st.lists(st.tuples(share, share), min_size=4, max_size=30))
def test_correlations_are_those_of_scipy_with_fishers_interval(pairs):
    x, y = zip(*pairs, strict=True)
    if np.std(x) < 1e-6 or np.std(y) < 1e-6:
        return
    found = correlation(x, y)
    wanted = pearsonr(x, y)
    assert found.n == len(x)
    assert found.pearson.value == pytest.approx(wanted.statistic, abs=1e-6)
    if abs(wanted.statistic) < 1 - 1e-9:
        interval = wanted.confidence_interval(0.95)
        assert found.pearson.low == pytest.approx(interval.low, abs=1e-6)
        assert found.pearson.high == pytest.approx(interval.high, abs=1e-6)


def test_few_pairs_have_no_coefficient_or_no_interval():
    for x, y in (([], []), ([1, 2], [3, 4]), ([1, 1, 1], [1, 2, 3])):
        assert correlation(x, y).pearson is None
    found = correlation([1, 2, 3], [1, 2, 4]).pearson
    assert found.value == pytest.approx(pearsonr([1, 2, 3], [1, 2, 4]).statistic)
    assert (found.low, found.high) == (-1, 1)
