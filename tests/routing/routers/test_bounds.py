"""Bounds on single contributions to statistics of a pool."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phatgoose.routing.routers import discriminant
from phatgoose.routing.routers.discriminant import (
    VARIED,
    bound_of,
    bounded_means,
    bounded_variances,
    line_of,
)
from tiny import random


def test_a_bound_is_the_number_of_experts_times_the_median():
    assert bound_of(torch.tensor([1.0, 2.0, 3.0, 100.0])) == 4 * 2.5
    assert bound_of(torch.tensor([[1.0, 5.0], [2.0, 6.0], [9.0, 7.0]])).tolist() == [6, 18]


def test_what_lies_within_its_bound_is_not_changed_by_a_bit():
    means = random(6, 5)
    assert torch.equal(bounded_means(means), means)
    factor = torch.eye(5).double().repeat(6, 1, 1) * torch.linspace(1, 1.5, 6)[:, None, None]
    rest = random(6, 5, seed=1).square().double() * 0 + 0.1
    got = bounded_variances(means.double(), factor, rest)
    assert torch.equal(got[0], factor)
    assert torch.equal(got[1], rest)


@pytest.mark.parametrize("by", [1e2, 1e30])
def test_one_mean_moves_the_pools_by_a_median_at_most(by):
    means = random(5, 7)
    changed = means.clone()
    changed[0] *= by
    got = bounded_means(changed)
    assert torch.equal(got[1:], means[1:])
    middle = changed.double().quantile(0.5, dim=0)
    median = (changed.double() - middle).norm(dim=1).quantile(0.5)
    moved = ((got.double() - middle).sum(dim=0) - (got[1:].double() - middle).sum(dim=0)) / 5
    assert float(moved.norm()) == pytest.approx(float(median), rel=1e-5)


@pytest.mark.parametrize("experts", [5, 40])
def test_one_covariance_adds_some_medians_at_most_in_its_direction(experts):
    means, rest = random(experts, 6).double(), torch.full((experts, 6), 0.5).double()
    factor = random(experts, 3, 6, seed=1).double()
    masking = factor.clone()
    direction = torch.nn.functional.normalize(random(6, seed=2).double(), dim=0)
    masking[0, 0] = 1e6 * direction
    shrunk, within = bounded_variances(means, masking, rest)
    added = float((shrunk[0, 0] @ direction) ** 2) / experts
    along = (masking @ direction).square().sum(dim=1) + rest @ direction.square()
    assert added < 2.0 * VARIED * float(along.quantile(0.5))  # of a sample where there are many
    assert torch.equal(within, rest)
    loud = rest.clone()
    loud[0, 2] = 1e9
    _, within = bounded_variances(means, factor, loud)
    spread = factor.square().sum(dim=1)[:, 2] + loud[:, 2]
    assert float(within[0, 2]) == pytest.approx(
        VARIED * experts * float(spread.quantile(0.5)), rel=1e-4
    )


def test_two_experts_have_no_bounds():
    means = torch.stack([random(4), 1e6 * random(4, seed=1)])
    assert torch.equal(bounded_means(means), means)
    factor = torch.stack([random(2, 4), 1e6 * random(2, 4, seed=1)]).double()
    rest = torch.zeros(2, 4).double()
    torch.testing.assert_close(bounded_variances(means.double(), factor, rest)[0], factor)


def test_a_large_pool_is_compared_with_some_of_its_experts(monkeypatch):
    monkeypatch.setattr(discriminant, "COMPARED", 3)
    factor = torch.eye(4).double()[None].repeat(9, 1, 1)
    rest = torch.zeros(9, 4).double()
    factor[4] *= 1000  # in the middle of the sample
    shrunk, _ = bounded_variances(random(9, 4).double(), factor, rest)
    assert shrunk[4].square().sum(dim=1).max() < 9.1 * VARIED
    assert torch.equal(shrunk[0], factor[0])


def test_bounds_that_nobody_exceeds_cost_less_than_the_covariance():
    """A thousand experts must not take minutes to compose."""
    experts, rank, d = 40, 8, 64
    factor, rest = random(experts, rank, d).double(), torch.ones(experts, d).double()
    with FlopCounterMode(display=False) as counted:
        bounded_variances(random(experts, d).double(), factor, rest)
    assert 0 < counted.get_total_flops() < 2 * experts * rank * d * d


@pytest.mark.parametrize("groups", [[2, 1], [3, 1, 1], [5, 1, 1, 1], [6, 2, 2], [2, 2, 1]])
@pytest.mark.parametrize("noise", [0.0, 0.03, 1.0])
def test_experts_that_share_a_task_leave_the_others_theirs(groups, noise):
    """Their means lie together, and the bound must not move every other mean onto them."""
    draw = torch.Generator().manual_seed(len(groups))
    d, tasks = 32, torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    centres = 10 * torch.nn.functional.normalize(torch.randn(len(groups), d, generator=draw), dim=1)
    means = centres[tasks] + noise * torch.randn(len(tasks), d, generator=draw) / d**0.5
    moments = {
        "mean": means,
        "factor": torch.zeros(len(tasks), 2, d),
        "rest": torch.ones(len(tasks), d),
    }
    slopes, offsets = line_of(moments, 0.3, 0.0, "discriminant")
    prompts = centres.repeat_interleave(50, dim=0)
    prompts = prompts + torch.randn(len(prompts), d, generator=draw)
    found = tasks[(prompts @ slopes + offsets).argmax(dim=1)]
    right = (found == torch.arange(len(groups)).repeat_interleave(50)).float().mean()
    assert right > 0.98
