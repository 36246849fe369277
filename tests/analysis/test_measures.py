"""Measures of routing distributions: ranges, definitions, and numbers known otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from phatgoose.analysis.measures import (
    SMOOTHING,
    as_distribution,
    concentration,
    effective_experts,
    entropy,
    kl_divergence,
    load,
    overlap,
    smoothed,
)
from phatgoose.errors import EvaluationError

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
    assert load(p).mean() == pytest.approx(1)
    assert 0 <= overlap(p, q) <= 1 + 1e-9
    assert overlap(p, q) == pytest.approx(1 - np.abs(p - q).sum() / 2)
    most = math.log(((1 - SMOOTHING) + SMOOTHING / size) / (SMOOTHING / size))
    assert 0 <= kl_divergence(p, q) <= most + 1e-9


@pytest.mark.parametrize("experts", [2, 8, 166])
def test_one_expert_and_all_alike_are_the_extremes(experts):
    one, even = np.eye(experts)[0], np.full(experts, 1 / experts)
    assert (entropy(one), effective_experts(one), concentration(one)) == (0, 1, 1)
    assert effective_experts(even) == pytest.approx(experts)
    assert concentration(even) == pytest.approx(1 / experts)
    assert load(one)[0] == experts
    assert overlap(one, np.eye(experts)[1]) == 0


@pytest.mark.parametrize("values", [[0, 0], [1, -1], [math.nan, 1], [math.inf, 1]])
def test_what_is_no_distribution_is_refused(values):
    with pytest.raises(EvaluationError, match="nothing recorded"):
        as_distribution(values)
