"""Router phatgoose against the paper's formula, and the rules that vary it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oracle import plain_scores
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of
from phatgoose.routing.routers.phatgoose import standardise
from routed_models import by_vectors, router_at
from tiny import logits_of, make_ids, random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama; 32 inputs


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_affinities_and_weights_are_those_of_the_paper(k, spread):
    gates, u = random(5, 33) + 3, spread * (random(9, 33, seed=1) + 0.5)
    router, wanted = by_vectors("phatgoose", standardise(gates), k), plain_scores(u, gates)
    got = router.router.scores(u, router).double()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    decision, best = router(u), wanted.topk(k)
    assert torch.equal(decision.experts, best.indices)
    torch.testing.assert_close(
        decision.weights.double(), best.values.softmax(-1), rtol=1e-4, atol=1e-5
    )
    over_all = wanted.softmax(dim=-1).topk(k, dim=-1).values  # the released code's, renormalised
    over_all /= over_all.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(decision.weights.double(), over_all, rtol=1e-4, atol=1e-5)


def test_a_constant_activation_has_no_favourite():
    decision = by_vectors("phatgoose", standardise(random(5, 32)))(torch.full((1, 32), 2.0))
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
    first, second, *others = llama_pool.experts
    constant = {site: torch.full_like(v, value) for site, v in second.gates.items()}
    flat = replace(second, gates=constant, means=constant)
    model = compose(Pool((first, flat, *others)), llama, k=4, router=router)
    for layer in composition_of(model).layers.values():
        scores = layer.router.router.scores(random(6, layer.in_features), layer.router)
        assert not scores[:, 1].any()
        assert scores[:, 0].all()
    assert logits_of(model, make_ids()).isfinite().all()


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow"])
def test_a_temperature_divides_every_affinity_and_the_top_k_act(llama, llama_pool, router):
    one, half = (
        router_at(SITE, llama, llama_pool, f"{router}:temperature={value}") for value in (1, 0.5)
    )
    u = random(7, 32)
    scores = half.router.scores(u, half)
    torch.testing.assert_close(scores, 2 * one.router.scores(u, one))
    decision, best = half(u), scores.topk(2)
    assert torch.equal(decision.experts, best.indices)
    torch.testing.assert_close(decision.weights, best.values.softmax(-1))
