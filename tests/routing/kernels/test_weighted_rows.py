"""Weighted sums of rows, against a loop over tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_problems import bottleneck_arguments
from mixed_experts import (
    PRECISE,
)
from phatgoose.routing.kernels.plain import reference_rows, weighted_rows


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 9),
    experts=st.integers(1, 7),
    d=st.integers(1, 9),
)
@settings(max_examples=30)
def test_weighted_rows_have_the_values_and_gradients_of_the_loop(seed, tokens, experts, d):
    _, chosen, weights, *_, rows, _ = bottleneck_arguments(seed, tokens, experts, 1, 1, d)
    wanted = reference_rows(chosen, weights, rows)
    torch.testing.assert_close(weighted_rows(chosen, weights, rows), wanted, **PRECISE)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
    found, slopes = (
        torch.autograd.grad((f(chosen, weights, rows) * cotangent).sum(), [weights, rows])
        for f in (weighted_rows, reference_rows)
    )
    torch.testing.assert_close(found, slopes, rtol=1e-4, atol=1e-4)
