"""Router phatgoose: its gates, and pools whose experts lack them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oracle import mixture
from phatgoose.errors import PoolError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from routed_models import with_vectors
from tiny import logits_of, make_ids, random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama; 32 inputs


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("router", ["phatgoose", "average-activation"])
def test_an_untrained_gate_scores_zero_and_warns_once(llama, llama_pool, router, value):
    pool = with_vectors(llama_pool, "e1", value)
    with pytest.warns(UserWarning, match="'e1'") as warned:
        model = compose(pool, llama, k=4, router=router)
    assert len(warned) == 1
    for layer in composition_of(model).layers.values():
        u = random(6, layer.in_features)
        scores = layer.router.affinities(u)
        assert not scores[:, 1].any()
        assert scores[:, 0].all()
    assert logits_of(model, make_ids()).isfinite().all()


def test_a_pool_of_untrained_gates_alone_is_no_nan(llama, llama_pool):
    pool = with_vectors(llama_pool.select(["e0"]), "e0", 0.0)
    with pytest.warns(UserWarning, match="'e0'"):
        model = compose(pool, llama, k=1)
    assert logits_of(model, make_ids()).isfinite().all()


def test_gates_and_means_choose_differently(llama_pool):
    u = random(8, 32)
    gates, means = (mixture(u, llama_pool.experts, SITE, 1, kind) for kind in ("gates", "means"))
    assert not torch.allclose(gates, means)


@pytest.mark.parametrize(
    ("router", "kind"), [("phatgoose", "gates"), ("average-activation", "means")]
)
def test_missing_vectors_are_told(llama, llama_pool, router, kind):
    first = replace(llama_pool.experts[0], **{kind: {}})
    with pytest.raises(PoolError, match=f"'e0' has no {kind}"):
        compose(Pool((first, *llama_pool.experts[1:])), llama, router=router)
