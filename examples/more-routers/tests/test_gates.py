"""PHATGOOSE with equal weights, and with scores relative to neutral text."""

from __future__ import annotations

import pytest
import torch
from more_routers.neutral import over_neutral_text

from oracle import plain_scores
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.sites import find_sites
from routed_models import router_at
from tiny import random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama


@pytest.mark.parametrize("k", [1, 2, 3])
def test_uniform_top_k_takes_the_experts_of_phatgoose_and_weighs_them_alike(base, pool, k):
    decisions = {}
    for router in ("phatgoose", "uniform-top-k"):
        layers = composition_of(compose(pool, base, router=router, k=k)).layers
        decisions[router] = {
            site: layer.at_site(random(9, layer.in_features)) for site, layer in layers.items()
        }
        detach(base.model)
    for site, wanted in decisions["phatgoose"].items():
        got = decisions["uniform-top-k"][site]
        assert torch.equal(got.experts, wanted.experts)
        torch.testing.assert_close(got.weights, torch.full((9, k), 1 / k))


def test_calibrated_is_the_papers_less_what_neutral_text_has_of_it(llama, pool_of, read_neutrally):
    three = pool_of("llama", (4, 4, 4))
    gates, u = three.vectors("gates", SITE).float(), random(7, 32)
    usual = plain_scores(read_neutrally(llama)[SITE], gates)
    expected = (plain_scores(u, gates) - usual.mean(dim=0)) / usual.std(dim=0, correction=0)
    at_site = router_at(SITE, llama, three, "calibrated")
    found = at_site.router.scores(u, at_site)
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2e-3)


def test_calibrated_divides_its_scores_by_the_temperature(llama, pool_of):
    three, u = pool_of("llama", (4, 4, 4)), random(7, 32)
    usual, warm = (
        router_at(SITE, llama, three, text) for text in ("calibrated", "calibrated:temperature=2.5")
    )
    wanted = usual.router.scores(u, usual) / 2.5
    torch.testing.assert_close(warm.router.scores(u, warm), wanted)


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_moments_are_those_of_all_real_tokens(base, read_neutrally):
    read, sites = read_neutrally(base), find_sites(base.model)
    moments = over_neutral_text(base.model, base.tokenizer, sites, lambda _, u: u)
    for name, (mean, deviation) in moments.items():
        wanted = read[name].std(dim=0, correction=0)
        torch.testing.assert_close(mean, read[name].mean(dim=0), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(deviation, wanted, atol=1e-3, rtol=1e-2)
