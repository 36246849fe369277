"""Measures of routing distributions, and correlations, compared to scipy's."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from scipy.stats import pearsonr

from phatgoose.analysis.measures import (
    SMOOTHING,
    as_distribution,
    concentration,
    correlation,
    effective_experts,
    entropy,
    kl_divergence,
    smoothed,
)

share = st.floats(0, 1, allow_subnormal=False)


def distributions(size):
    rows = st.lists(share, min_size=size, max_size=size)
    return rows.filter(lambda row: sum(row) > 1e-3).map(lambda row: as_distribution(row))


two = st.integers(2, 12).flatmap(lambda n: st.tuples(distributions(n), distributions(n)))


@given(two)
def test_entropies_and_divergences_are_those_of_scipy(pair):
    p, q = pair
    assert entropy(p) == pytest.approx(scipy_entropy(p), abs=1e-9)
    wanted = scipy_entropy(smoothed(p), smoothed(q))
    assert kl_divergence(p, q) == pytest.approx(wanted, abs=1e-9)


@given(two)
def test_measures_stay_in_their_ranges(pair):
    p, q = pair
    size = len(p)
    assert 0 <= entropy(p) <= math.log(size) + 1e-9
    assert 1 - 1e-9 <= effective_experts(p) <= size + 1e-9
    assert 1 / size - 1e-9 <= concentration(p) <= 1 + 1e-9
    most = math.log(((1 - SMOOTHING) + SMOOTHING / size) / (SMOOTHING / size))
    assert 0 <= kl_divergence(p, q) <= most + 1e-9


@pytest.mark.parametrize("experts", [2, 8, 166])
def test_one_expert_and_all_alike_are_the_extremes(experts):
    one, even = np.eye(experts)[0], np.full(experts, 1 / experts)
    assert (entropy(one), effective_experts(one), concentration(one)) == (0, 1, 1)
    assert effective_experts(even) == pytest.approx(experts)
    assert concentration(even) == pytest.approx(1 / experts)


def test_a_divergence_from_oracle_is_finite_and_known():
    even, oracle = np.full(4, 0.25), np.eye(4)[0]
    s, low = (0.99 + 0.01 / 4), 0.01 / 4
    wanted = 0.25 * math.log(0.25 / s) + 0.75 * math.log(0.25 / low)
    assert kl_divergence(even, oracle) == pytest.approx(wanted)
    assert kl_divergence(oracle, even) == pytest.approx(
        s * math.log(s / 0.25) + 3 * low * math.log(low / 0.25)
    )


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


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [3, 4]), ([1, 1, 1], [1, 2, 3])])
def test_no_coefficient_without_enough_to_go_by(x, y):
    found = correlation(x, y)
    assert found.pearson is None


def test_three_pairs_have_coefficients_but_no_interval():
    found = correlation([1, 2, 3], [1, 2, 4])
    assert found.pearson.value == pytest.approx(pearsonr([1, 2, 3], [1, 2, 4]).statistic)
    assert (found.pearson.low, found.pearson.high) == (-1, 1)
