"""Affinities of standardised vectors and activations, and the top k of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import layer_norm

from phatgoose.routing.routers.vector_router import ScoredRouter, standardise
from tiny import random

EPS = 1e-5


def scored(gates: torch.Tensor, k: int = 2, eps: float = EPS) -> ScoredRouter:
    return ScoredRouter(standardise(gates), k, eps)


def plain_scores(u: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """v̄ᵀū/√n with both standardised as the method's formula says, float64 [T, E]."""
    u, v = u.double(), gates.double()
    u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    v = (v - v.mean(-1, keepdim=True)) / v.std(-1, unbiased=False, keepdim=True)
    return u @ v.T / math.sqrt(u.shape[-1])


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_folded_standardisation_equals_the_plain_one(spread):
    gates, u = random(5, 33) + 3, spread * (random(9, 33, seed=1) + 0.5)
    got = scored(gates).affinities(u)
    torch.testing.assert_close(got.double(), plain_scores(u, gates), rtol=1e-4, atol=1e-5)


def test_activations_are_standardised_as_layer_norm_does():
    gates, u = random(5, 32), 0.003 * random(9, 32, seed=1)
    plain = layer_norm(u, (32,), eps=EPS) @ standardise(gates).T / math.sqrt(32)
    torch.testing.assert_close(scored(gates).affinities(u), plain)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_softmax_is_over_the_chosen_k_only(k):
    gates, u = random(5, 32), random(9, 32, seed=1)
    decision = scored(gates, k)(u)
    scores = plain_scores(u, gates).sort(dim=-1, descending=True)
    assert torch.equal(decision.experts, scores.indices[:, :k])
    torch.testing.assert_close(
        decision.weights.double(), scores.values[:, :k].softmax(-1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_softmax_over_all_then_renormalised_is_the_same(k):
    gates, u = random(5, 32), random(9, 32, seed=1)
    decision = scored(gates, k)(u)
    over_all = plain_scores(u, gates).softmax(dim=-1).topk(k, dim=-1)
    renormalised = over_all.values / over_all.values.sum(dim=-1, keepdim=True)
    assert torch.equal(decision.experts, over_all.indices)
    torch.testing.assert_close(decision.weights.double(), renormalised, rtol=1e-5, atol=1e-6)


def test_only_the_direction_of_a_gate_counts():
    gates, u = random(5, 32), random(9, 32, seed=1)
    scales = torch.tensor([[0.01], [1.0], [50.0], [3.0], [0.5]])
    decision, other = scored(gates)(u), scored(gates * scales + 2)(u)
    assert torch.equal(decision.experts, other.experts)
    torch.testing.assert_close(decision.weights, other.weights, rtol=1e-4, atol=1e-5)


def test_k_is_lowered_to_the_number_of_experts():
    assert scored(random(3, 8), k=7)(random(2, 8)).experts.shape == (2, 3)


def test_a_single_token_is_routed():
    decision = scored(random(5, 32))(random(1, 32, seed=1))
    assert decision.experts.shape == (1, 2)
    assert decision.weights.sum().item() == pytest.approx(1)


def test_a_constant_activation_weighs_its_experts_equally():
    decision = scored(random(5, 32))(torch.full((1, 32), 2.0))
    torch.testing.assert_close(decision.weights, torch.tensor([[0.5, 0.5]]), rtol=0, atol=1e-2)


@pytest.mark.parametrize("size", [32, 576, 2048])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1000.3])
def test_a_constant_gate_standardises_to_zeros(value, size):
    assert not standardise(torch.full((1, size), value)).any()


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_a_trained_gate_of_any_size_keeps_its_direction(size):
    gate = random(1, 64)
    torch.testing.assert_close(standardise(size * gate), standardise(gate), rtol=1e-4, atol=1e-5)
