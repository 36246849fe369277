"""Layers that follow what was looked up for whole inputs."""

from __future__ import annotations

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.routing.routers.prompt_router import LookedUpRouter
from phatgoose.routing.routers.router import Lookup, Mixtures


class Fixed(Lookup):
    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.serve(Mixtures.alone(torch.tensor(rows)) if rows else None)


def test_tokens_belong_to_the_rows_in_turn():
    router = LookedUpRouter(torch.tensor([0, 2, 3]), 4, Fixed(3, 1, 0))
    decision = router(torch.zeros(6, 5))
    assert decision.experts[:, 0].tolist()[:2] == [2, 2]  # e3 is the third of this site
    assert decision.experts[:, 0].tolist()[4:] == [0, 0]
    assert decision.weights[:, 0].tolist() == [1, 1, 0, 0, 1, 1]  # e1 isn't here
    assert router(torch.zeros(0, 5)).experts.shape == (0, 1)


def test_one_row_serves_any_number_of_tokens():
    decision = LookedUpRouter(torch.tensor([0, 1]), 2, Fixed(1))(torch.zeros(7, 5))
    assert decision.experts[:, 0].tolist() == [1] * 7


def test_tokens_that_do_not_fit_the_rows_are_told():
    with pytest.raises(RoutingError, match="7 tokens can't be shared out to 3 inputs"):
        LookedUpRouter(torch.tensor([0, 1]), 2, Fixed(1, 0, 1))(torch.zeros(7, 5))
    with pytest.raises(RoutingError, match="Nothing has told the router"):
        LookedUpRouter(torch.tensor([0, 1]), 2, Fixed())(torch.zeros(7, 5))


def test_several_experts_of_a_row_act_with_its_weights():
    lookup = Fixed()
    experts, weights = torch.tensor([[3, 1], [0, 3]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    lookup.serve(Mixtures(experts, weights))
    router = LookedUpRouter(torch.tensor([0, 2, 3]), 4, lookup)
    decision = router(torch.zeros(4, 5))
    assert decision.experts[:, 0].tolist() == [2, 2, 0, 0]
    absent = torch.tensor([[0.7, 0], [0.7, 0], [0.6, 0.4], [0.6, 0.4]])  # e1 isn't here
    assert torch.equal(decision.weights, absent)
    spread = torch.tensor([[0, 0, 0.7], [0, 0, 0.7], [0.6, 0, 0.4], [0.6, 0, 0.4]])
    assert torch.equal(router.distribution(torch.zeros(4, 5)), spread)


def test_one_that_is_absent_takes_nothing_from_the_first_of_the_site():
    lookup = Fixed()
    lookup.serve(Mixtures(torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.3]])))
    router = LookedUpRouter(torch.tensor([0, 2]), 3, lookup)
    assert router.distribution(torch.zeros(1, 5)).tolist() == [[pytest.approx(0.7), 0]]
