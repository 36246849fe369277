"""PHATGOOSE with equal weights, and with scores relative to neutral text."""

from __future__ import annotations

import pytest
import torch
from more_routers.neutral import over_neutral_text

from oracle import plain_scores
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.sites import find_sites
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import neutral_examples
from routed_models import router_at
from tiny import logits_of, random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama


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


def scored(router, u):
    return router.router.scores(u, router)


@pytest.fixture
def three(pool_of):
    """Three experts of the tiny Llama."""
    return pool_of("llama", (4, 4, 4))


def test_calibrated_is_the_papers_less_what_neutral_text_has_of_it(llama, three):
    gates, u, seen = three.vectors("gates", SITE).float(), random(7, 32), []
    hook = llama.model.get_submodule(SITE).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    for example in neutral_examples():
        pair = Encoder.of(llama).pairs([example])[0]
        logits_of(llama.model, torch.tensor([pair.prompt + pair.target]))
    hook.remove()
    usual = plain_scores(torch.cat(seen), gates)
    expected = (plain_scores(u, gates) - usual.mean(dim=0)) / usual.std(dim=0, correction=0)
    found = scored(router_at(SITE, llama, three, "calibrated"), u)
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_moments_are_those_of_all_real_tokens(base):
    sites = find_sites(base.model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
    hooks = [
        base.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in sites
    ]
    for pair in Encoder.of(base).pairs(neutral_examples()):
        if base.model.config.is_encoder_decoder:
            target = torch.tensor([[base.model.config.decoder_start_token_id, *pair.target[:-1]]])
            logits_of(base.model, torch.tensor([pair.prompt]), decoder_input_ids=target)
        else:
            logits_of(base.model, torch.tensor([pair.prompt + pair.target]))
    for hook in hooks:
        hook.remove()
    for name, (mean, deviation) in over_neutral_text(
        base.model, base.tokenizer, sites, lambda _, u: u
    ).items():
        tokens = torch.cat(seen[name])
        torch.testing.assert_close(mean, tokens.mean(dim=0), atol=1e-4, rtol=1e-3)
        wanted = tokens.std(dim=0, correction=0)
        torch.testing.assert_close(deviation, wanted, atol=1e-3, rtol=1e-2)
