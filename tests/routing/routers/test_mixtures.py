"""The experts of whole inputs, with weights: chosen, joined and shared out."""

from __future__ import annotations

import torch

from phatgoose.routing.routers.router import Mixtures


def test_the_best_are_weighted_by_the_softmax_of_their_scores():
    scores = torch.tensor([[0.1, 0.7, 0.3], [2.0, -1.0, 2.0]])
    found = Mixtures.best(scores, 2, 0.5)
    assert found.experts.tolist() == [[1, 2], [0, 2]]  # of equals the first
    expected = torch.tensor([[1.4, 0.6], [4.0, 4.0]]).exp()
    torch.testing.assert_close(found.weights, expected / expected.sum(1, keepdim=True))
    assert Mixtures.best(scores, 9, 1.0).experts.shape == (2, 3)


def test_one_alone_has_the_weight_one_exactly():
    found = Mixtures.best(torch.randn(5, 4), 1, 0.3)
    assert torch.equal(found.weights, Mixtures.alone(found.experts[:, 0]).weights)
    assert torch.equal(found.weights, torch.ones(5, 1))


def test_rows_are_taken_apart_and_joined_and_shared_out():
    found = Mixtures.best(torch.randn(3, 5), 2, 1.0)
    again = Mixtures.joined(found.each())
    assert torch.equal(again.experts, found.experts)
    assert torch.equal(again.weights, found.weights)
    assert torch.equal(found.of([2, 0]).experts, found.experts[[2, 0]])
    assert torch.equal(found.shared_out(6).weights, found.weights[[0, 0, 1, 1, 2, 2]])
