"""Bottlenecks of many experts at once, against a loop over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_problems import bottleneck_arguments
from phatgoose.routing.kernels.plain import (
    all_bottlenecks,
    choose_bottleneck,
    grouped_bottleneck,
    reference_bottleneck,
)


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 9),
    experts=st.integers(1, 7),
    m=st.integers(1, 5),
    d=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=30)
def test_bottleneck_bodies_have_the_values_and_gradients_of_the_loop(
    seed, tokens, experts, m, d, data
):
    k = data.draw(st.integers(1, experts))
    arguments = bottleneck_arguments(seed, tokens, experts, k, m, d)
    learnt = [each for each in arguments if each.requires_grad]
    wanted = reference_bottleneck(*arguments)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
    slopes = torch.autograd.grad((wanted * cotangent).sum(), learnt)
    for body in (all_bottlenecks, grouped_bottleneck):
        got = body(*arguments)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad((got * cotangent).sum(), learnt)
        torch.testing.assert_close(found, slopes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("experts", "k", "body"), [(4, 2, all_bottlenecks), (5, 2, grouped_bottleneck)]
)
def test_few_bottlenecks_are_computed_side_by_side(experts, k, body):
    y, chosen, _, down, *_ = bottleneck_arguments(0, 3, experts, k, 2, 4)
    assert choose_bottleneck(y, chosen, down) is body
