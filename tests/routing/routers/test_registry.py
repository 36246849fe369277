"""Every router of the registry, and names that are none."""

from __future__ import annotations

import pytest
import torch

from oracle import token_weights
from phatgoose.errors import ConfigError
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.registry import ROUTERS
from phatgoose.tasks.batching import pad_left, pad_right
from routed_models import compose_by
from tiny import logits_of, make_ids, random
from topic_prompts import experts_of

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama; 32 inputs


def test_an_unknown_router_is_refused(llama, llama_pool):
    with pytest.raises(ConfigError, match="'best'"):
        compose(llama_pool, llama, router="best")


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_of_every_router_sum_to_one(llama, llama_pool, toy_embedder, router):
    model = compose_by(router, llama_pool, llama)
    if composition_of(model).context and router != "oracle":
        composition_of(model).context.use(experts_of(model, ("plums", "1 + 2", "WHO?")))
    for layer in composition_of(model).layers.values():
        decision = layer.router(random(6, layer.in_features))
        assert decision.experts.shape == decision.weights.shape
        assert decision.experts.dtype == torch.int64
        assert decision.weights.dtype == torch.float32
        torch.testing.assert_close(decision.weights.sum(dim=-1), torch.ones(6))
        chosen = decision.experts.sort(dim=-1).values
        assert chosen.diff(dim=-1).ne(0).all()  # nobody twice


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_leaves_the_base_as_it_was(base, pool, toy_embedder, router):
    ids, plain = make_ids(rows=2), dict(base.model.named_modules())
    attributes, wanted = set(vars(base.model)), logits_of(base.model, ids)
    assert not torch.equal(logits_of(compose_by(router, pool, base), ids), wanted)
    detach(base.model)
    assert dict(base.model.named_modules()) == plain
    assert set(vars(base.model)) == attributes
    for module in base.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert torch.equal(logits_of(base.model, ids), wanted)


@pytest.mark.parametrize("router", [router for router in ROUTERS if router != "random"])
@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_every_router_generates_a_padded_batch_as_its_rows_alone(base, pool, toy_embedder, router):
    model = compose_by(router, pool, base)
    long, short = make_ids(tokens=9), make_ids(tokens=5, seed=1)
    pad = pad_right if base.is_encoder_decoder else pad_left
    ids = pad([long[0].tolist(), short[0].tolist()], 0)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    got = model.generate(ids, attention_mask=ids.ne(0).long(), **options)
    for row, alone in zip(got, (long, short), strict=True):
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(row[-5:], wanted[0, -5:])


def test_the_oracle_itself_weighs_the_best_expert_most(llama_pool):
    weights = token_weights(random(32), llama_pool.experts, SITE, k=3)
    assert len(weights) == 3
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
