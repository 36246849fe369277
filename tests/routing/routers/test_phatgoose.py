"""Router phatgoose against the paper's formula, and the rules that vary it."""

from __future__ import annotations

import pytest
import torch

from oracle import plain_scores
from phatgoose.routing.compose import compose, composition_of
from phatgoose.routing.routers.phatgoose import standardise
from phatgoose.routing.routers.router import SiteRouter
from routed_models import by_vectors, router_at, with_vectors
from tiny import logits_of, make_ids, random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama; 32 inputs


def scored(gates: torch.Tensor, k: int = 2) -> SiteRouter:
    return by_vectors("phatgoose", standardise(gates), k)


def scores_by(router: SiteRouter, u: torch.Tensor) -> torch.Tensor:
    return router.router.scores(u, router)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_affinities_are_those_of_the_paper(spread):
    gates, u = random(5, 33) + 3, spread * (random(9, 33, seed=1) + 0.5)
    got = scores_by(scored(gates), u)
    torch.testing.assert_close(got.double(), plain_scores(u, gates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_softmax_is_over_the_chosen_k_only_as_over_all_and_renormalised(k):
    gates, u = random(5, 32), random(9, 32, seed=1)
    decision = scored(gates, k)(u)
    scores = plain_scores(u, gates).sort(dim=-1, descending=True)
    assert torch.equal(decision.experts, scores.indices[:, :k])
    wanted = scores.values[:, :k].softmax(-1)
    torch.testing.assert_close(decision.weights.double(), wanted, rtol=1e-5, atol=1e-6)
    over_all = plain_scores(u, gates).softmax(dim=-1).topk(k, dim=-1).values  # the released code's
    over_all /= over_all.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(decision.weights.double(), over_all, rtol=1e-5, atol=1e-6)


def test_a_constant_activation_has_no_favourite():
    decision = scored(random(5, 32))(torch.full((1, 32), 2.0))  # a constant activation
    torch.testing.assert_close(decision.weights, torch.tensor([[0.5, 0.5]]), rtol=0, atol=1e-2)


@pytest.mark.parametrize("size", [32, 576, 2048])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1000.3])
def test_a_constant_gate_standardises_to_zeros(value, size):
    assert not standardise(torch.full((1, size), value)).any()


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_a_trained_gate_of_any_size_keeps_its_direction(size):
    gate = random(1, 64)
    torch.testing.assert_close(standardise(size * gate), standardise(gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("router", ["phatgoose", "average-activation"])
def test_an_untrained_gate_scores_zero(llama, llama_pool, router, value):
    pool = with_vectors(llama_pool, "e1", value)
    model = compose(pool, llama, k=4, router=router)
    for layer in composition_of(model).layers.values():
        scores = scores_by(layer.router, random(6, layer.in_features))
        assert not scores[:, 1].any()
        assert scores[:, 0].all()
    assert logits_of(model, make_ids()).isfinite().all()


# The temperature


@pytest.fixture
def three(pool_of):
    """Three experts of the tiny Llama."""
    return pool_of("llama", (4, 4, 4))


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow"])
def test_a_temperature_divides_every_affinity_and_the_top_k_act(llama, three, router):
    u = random(7, 32)
    one, half = (
        router_at(SITE, llama, three, f"{router}:temperature={value}") for value in (1, 0.5)
    )
    torch.testing.assert_close(scores_by(half, u), 2 * scores_by(one, u))
    with torch.no_grad():
        decision = half(u)
    best = scores_by(half, u).topk(2)
    assert torch.equal(decision.experts, best.indices)
    torch.testing.assert_close(decision.weights, best.values.softmax(-1))
