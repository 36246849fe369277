"""Shares: constant ones are read off, others are means over tokens, then prompts."""

from __future__ import annotations

import pytest
import torch

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.export.shares import constant_shares, prompt_texts, shares_for, shares_of
from phatgoose.routing.recording import record
from routed_models import compose_by


def test_constant_routing_is_told_from_other_routing(llama, llama_pool):
    def shares(**options):
        return constant_shares(composition_of(compose(llama_pool, llama, **options)))

    merged = shares(router="merged")
    assert merged.whole() == dict.fromkeys(llama_pool.names, 0.25)
    assert merged.chosen_for is None


def test_shares_are_means_over_tokens_then_prompts(llama, llama_pool):
    model = compose(llama_pool, llama, k=2)
    assert constant_shares(composition_of(model)) is None
    texts = prompt_texts(["a", "many more tokens than one"])
    found = shares_for(model, llama.tokenizer, texts)
    assert found.chosen_for == "the prompt"
    passes = []
    for text in texts.examples:
        ids = torch.tensor([llama.tokenizer(text.input)["input_ids"]])
        with record(model) as recording, torch.no_grad():
            model(input_ids=ids)
        passes.append(recording.usage())
    for site, shares in found.by_site.items():
        wanted = torch.stack([usage[site] for usage in passes]).double().mean(dim=0)
        torch.testing.assert_close(shares, wanted, rtol=1e-5, atol=1e-6)
        assert found.at(site).keys() <= set(llama_pool.names)
    with pytest.raises(RoutingError, match="for every token"):
        shares_of(model)
    model.phatgoose.tokenizer = None
    with pytest.raises(ConfigError, match="tokenizer"):
        shares_of(model, texts)


def test_one_expert_alone_is_constant(llama, llama_pool):
    alone = compose(Pool(llama_pool.experts[:1]), llama, k=1)
    assert shares_of(alone).whole() == {"e0": 1.0}


def test_a_router_by_input_is_asked_for_its_texts(llama, llama_pool):
    model = compose_by("oracle", llama_pool, llama)
    with pytest.raises(RoutingError, match="for every input"):
        shares_of(model)
    with pytest.raises(RoutingError, match="no scores for task 'the prompt'"):
        shares_of(model, prompt_texts(["x"]))


def test_a_shortlist_is_routed_anew_for_every_token(llama, llama_pool):
    with pytest.raises(RoutingError, match="for every token"):
        shares_of(compose(llama_pool, llama, router="discriminant-phatgoose"))
