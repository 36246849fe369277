"""GLIDER beside its formula, one token and one expert at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oracle import EPS
from phatgoose.routing.compose import composition_of, detach
from routed_models import compose_by, with_embeddings
from tiny import assert_same_logits, logits_of, random
from topic_prompts import PROMPTS, both_streams, experts_of, retrieving
from toy_embedders import toy_embed

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama


def cosines_of(pool, text: str) -> list[float]:
    (query,) = toy_embed([text]).double()
    means = [expert.embeddings.double().mean(dim=0) for expert in with_embeddings(pool).experts]
    return [float(query @ mean / mean.norm()) for mean in means]


def logits_by_hand(pool, u: Tensor, text: str, scale: float) -> dict[int, float]:
    """The logits of the experts that act at SITE for one token u [n] of an input `text`."""
    u = u.double()
    u_bar = (u - u.mean()) / math.sqrt(u.var(unbiased=False) + EPS)
    cosines, logits = cosines_of(pool, text), {}
    for z, expert in enumerate(pool.experts):
        if SITE in expert.modules:
            gate = expert.gates[SITE].double()
            v_bar = (gate - gate.mean()) / gate.std(unbiased=False)
            logits[z] = float(v_bar @ u_bar) / math.sqrt(len(u)) + scale * cosines[z]
    return logits


@retrieving
@pytest.mark.parametrize(
    ("settings", "k", "scale", "temperature"),
    [
        ("", 2, 3.0, 1.0),
        (":weight=0.5", 3, 0.5, 1.0),
        (":temperature=2", 2, 3.0, 2.0),
        (":weight=100", 1, 100.0, 1.0),
    ],
)
def test_experts_and_weights_follow_the_formula(llama, uneven, settings, k, scale, temperature):
    model = compose_by(f"glider{settings}", uneven, llama, k=k)
    layer, u = composition_of(model).layers[SITE], random(6, 32)
    composition_of(model).context.use(experts_of(model, PROMPTS[:3]))
    decision = layer.at_site(u)
    spread = layer.at_site.distribution(u)
    assert set(layer.experts.tolist()) == {0, 1, 2}  # e3 acts at no query
    for t in range(6):
        logits = logits_by_hand(uneven, u[t], PROMPTS[t // 2], scale)
        chosen = sorted(logits, key=lambda z: -logits[z])[:k]
        assert layer.experts[decision.experts[t]].tolist() == chosen
        wanted = (torch.tensor([logits[z] for z in chosen]) / temperature).softmax(dim=0)
        torch.testing.assert_close(decision.weights[t], wanted, atol=1e-5, rtol=1e-5)
        every = (torch.tensor([logits[z] for z in (0, 1, 2)]) / temperature).softmax(dim=0)
        torch.testing.assert_close(spread[t], every, atol=1e-5, rtol=1e-5)


@retrieving
@both_streams
def test_with_a_large_lambda_it_is_the_nearest_centroids_expert(base, pool):
    ids = torch.tensor([base.tokenizer(PROMPTS[2])["input_ids"]])
    wanted = logits_of(compose_by("centroid", pool, base, k=1), ids)
    detach(base.model)
    model = compose_by("glider:weight=1e4", pool, base, k=1)
    assert_same_logits(logits_of(model, ids), wanted)
