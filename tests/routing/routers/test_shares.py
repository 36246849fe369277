"""Routers decide by shares of an activation as by the whole: layers split over processes."""

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.routing.routers.arrow import ArrowRouter
from phatgoose.routing.routers.configs import EPS
from phatgoose.routing.routers.fixed import UniformRouter
from phatgoose.routing.routers.phatgoose import (
    PhatgooseRouter,
    standardise,
)
from phatgoose.routing.routers.spectr import SpectrRouter
from tiny import random

N, E, K = 48, 7, 3


ROUTERS = {
    "phatgoose": lambda v: PhatgooseRouter(v, K, EPS),
    "arrow": lambda v: ArrowRouter(v, K),
    "merged": lambda v: UniformRouter(E, E + 1),
}


def shared(tensor: torch.Tensor, columns: slice) -> torch.Tensor:
    return tensor[..., columns] if tensor.shape[-1] == N else tensor


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_sums_of_all_shares_decide_as_the_whole_activation(name, size):
    router = ROUTERS[name](standardise(random(E, N)))
    u = 3 * random(11, N, seed=1) + 40  # a mean far above the deviations, which must cancel
    step, total = N // size, 0
    for rank in range(size):
        columns = slice(rank * step, (rank + 1) * step)
        mine = router.over({n: shared(t, columns) for n, t in router.state().items()})
        total = total + mine.sums(u[:, columns])
    got, wanted = router.decide(total, N), router(u)
    assert torch.equal(got.experts, wanted.experts)
    torch.testing.assert_close(got.weights, wanted.weights, rtol=1e-4, atol=1e-5)


def test_float32_between_processes_is_enough():
    router = PhatgooseRouter(standardise(random(E, N)), K, EPS)
    u = random(11, N, seed=1)
    got, wanted = router.decide(router.sums(u).float().double(), N), router(u)
    assert torch.equal(got.experts, wanted.experts)
    torch.testing.assert_close(got.weights, wanted.weights, rtol=1e-5, atol=1e-6)


def test_a_rule_over_other_tensors_leaves_the_first_as_it_is():
    one, other = (standardise(random(E, N, seed=seed)) for seed in (0, 1))
    router, u = PhatgooseRouter(one, K, EPS), random(5, N, seed=2)
    before = router(u)
    moved = router.over({"vectors": other})
    assert torch.equal(moved(u).weights, PhatgooseRouter(other, K, EPS)(u).weights)
    assert not torch.equal(moved(u).weights, before.weights)
    assert torch.equal(router(u).weights, before.weights)
    assert moved.vectors.data_ptr() == other.data_ptr()


def test_a_rule_that_needs_all_features_at_once_says_so():
    router = SpectrRouter(random(E, 2, N), K)
    with pytest.raises(RoutingError, match="SpectrRouter can't choose by shares"):
        router.sums(random(3, N))
