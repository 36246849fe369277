"""Router uniform-top-k: PHATGOOSE's experts, weighed alike."""

from __future__ import annotations

import pytest
import torch

from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from tiny import assert_same_logits, logits_of, make_ids, random


@pytest.mark.parametrize("k", [1, 2, 3])
def test_uniform_top_k_takes_the_experts_of_phatgoose_and_weighs_them_alike(base, pool, k):
    decisions = {}
    for router in ("phatgoose", "uniform-top-k"):
        layers = composition_of(compose(pool, base, router=router, k=k)).layers
        decisions[router] = {
            site: layer.router(random(9, layer.in_features)) for site, layer in layers.items()
        }
        detach(base.model)
    for site, wanted in decisions["phatgoose"].items():
        got = decisions["uniform-top-k"][site]
        assert torch.equal(got.experts, wanted.experts)
        torch.testing.assert_close(got.weights, torch.full((9, k), 1 / k))


def test_uniform_top_k_of_one_is_phatgoose_and_of_all_is_merged(llama, llama_pool):
    ids, logits = make_ids(rows=2), {}
    for router, k in (("phatgoose", 1), ("uniform-top-k", 1), ("uniform-top-k", 4), ("merged", 4)):
        logits[router, k] = logits_of(compose(llama_pool, llama, router=router, k=k), ids)
        detach(llama.model)
    assert torch.equal(logits["uniform-top-k", 1], logits["phatgoose", 1])
    assert_same_logits(logits["uniform-top-k", 4], logits["merged", 4])
