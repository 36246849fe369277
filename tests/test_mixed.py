"""Pools of several kinds of expert: each alone is itself, together they are the mixture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import (
    SCORES,
    assert_same_logits,
    compose_by,
    logits_of,
    make_ids,
    peft_model,
)
from mixed_experts import MAKERS, make_kind, mixed_output, naively_mixed
from phatgoose.alone import ModifiedLinear, put_in
from phatgoose.bases import load_base
from phatgoose.errors import ExpertError, PoolError
from phatgoose.layers import RoutedLinear
from phatgoose.mixed import MixedLinear
from phatgoose.pool import Pool
from phatgoose.routed import compose, composition_of, detach, record
from phatgoose.routers import ROUTERS
from phatgoose.storage import load, save

PRECISE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def mixed_pool_of(base_folders, tmp_path_factory):
    """`mixed_pool_of(kind)`: seven experts of all kinds, sizes and activations, made once."""
    made = {}

    def make(kind: str) -> Pool:
        if kind not in made:
            base, folder = (
                load_base(base_folders[kind], dtype="float32"),
                tmp_path_factory.mktemp(kind),
            )
            experts = [
                make_kind("lora", base, folder, seed=0, rank=2),
                make_kind("biased", base, folder, seed=1),
                make_kind("ia3", base, folder, seed=2),
                make_kind("bottleneck", base, folder, seed=3),
                make_kind("bottleneck", base, folder, seed=4, size=3, activation="gelu"),
                make_kind("bottleneck", base, folder, seed=5, placement="pfeiffer", scale=0.7),
                make_kind("ia3", base, folder, seed=6),
                make_kind("lora", base, folder, seed=7, rank=6),
            ]
            made[kind] = Pool(tuple(experts))
        return made[kind]

    return make


@pytest.fixture
def mixed_pool(kind, mixed_pool_of):
    return mixed_pool_of(kind)


@pytest.mark.parametrize("name", ["lora0", "biased1", "ia32", "bottleneck4"])
def test_a_pool_forced_to_one_expert_is_that_expert_alone(base, mixed_pool, name):
    ids = make_ids(rows=2)
    plain = logits_of(base.model, ids)
    expert = next(expert for expert in mixed_pool.experts if expert.name == name)
    if expert.kind == "bottleneck":
        with put_in(base.model, expert.modules, ModifiedLinear):
            wanted = logits_of(base.model, ids)
    else:
        wanted = logits_of(peft_model(base, expert.directory), ids)
    assert not torch.allclose(wanted, plain, atol=0.1)
    for options in ({"keep": [name], "k": 1}, {"router": "single", "expert": name}):
        assert_same_logits(logits_of(compose(mixed_pool, base, **options), ids), wanted)
        detach(base.model)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_every_layer_is_the_mixture_written_out(base, mixed_pool, k):
    from oracle import token_weights

    model = compose(mixed_pool, base, k=k)
    kinds = set()
    for site, layer in composition_of(model).layers.items():
        u = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(k))
        rows = [
            mixed_output(
                layer.base,
                t,
                mixed_pool.experts,
                token_weights(t, mixed_pool.experts, site, k),
                site,
            )
            for t in u.flatten(0, 1)
        ]
        torch.testing.assert_close(layer(u).flatten(0, 1), torch.stack(rows).float(), **PRECISE)
        kinds.add(frozenset(layer.stack.rows()) if isinstance(layer, MixedLinear) else None)
    assert frozenset({"lora", "input_scaling", "bottleneck"}) in kinds


def test_the_whole_model_is_the_naively_mixed_one(base, mixed_pool):
    ids = make_ids(rows=2, tokens=5)
    with naively_mixed(base.model, mixed_pool.experts, k=3):
        wanted = logits_of(base.model, ids)
    assert_same_logits(logits_of(compose(mixed_pool, base, k=3), ids), wanted)
