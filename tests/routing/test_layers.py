"""Pools of several kinds of expert: each alone is itself, together they are the mixture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixed_experts import PRECISE, each_kind, mixed_output
from oracle import token_weights
from phatgoose.errors import ExpertError
from phatgoose.experts.kind import ModifiedLinear, applied
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach
from tiny import assert_same_logits, logits_of, make_ids, peft_model


@each_kind
@pytest.mark.parametrize("k", [1, 2, 8])
def test_every_layer_is_the_mixture_written_out(base, mixed_pool, k):
    model, experts = compose(mixed_pool, base, k=k, router="phatgoose"), mixed_pool.experts
    parts = set()
    for site, layer in composition_of(model).layers.items():
        u = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(k))
        wanted = [
            mixed_output(layer.base, t, experts, token_weights(t, experts, site, k), site)
            for t in u.flatten(0, 1)
        ]
        torch.testing.assert_close(layer(u).flatten(0, 1), torch.stack(wanted).float(), **PRECISE)
        parts.add(frozenset(layer.stack.rows()))
    assert {"lora", "input", "bottleneck"} in parts
    assert {"lora", "output"} in parts


@each_kind
def test_merged_is_the_mean_of_what_each_adds(base, mixed_pool):
    model = compose(mixed_pool, base, router="merged")
    experts = mixed_pool.experts
    for site, layer in composition_of(model).layers.items():
        u = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0))
        weights = {z: 1 / 8 for z, expert in enumerate(experts) if site in expert.modules}
        wanted = mixed_output(layer.base, u[0], experts, weights, site)
        torch.testing.assert_close(layer(u)[0], wanted.float(), **PRECISE)


def test_a_gate_of_the_wrong_size_is_refused_where_only_the_base_can_tell(llama, llama_mixed):
    expert = llama_mixed.select(["ia32"]).experts[0]
    site = next(s for s, module in expert.modules.items() if not module.on_input)
    wrong = replace(expert, gates={**expert.gates, site: torch.ones(7)})
    with pytest.raises(ExpertError, match=rf"site {site}: .* means of \[7, 32\] numbers"):
        compose(Pool((wrong,)), llama, k=1, router="phatgoose")


@each_kind
@pytest.mark.parametrize("name", ["lora0", "biased1", "ia32", "bottleneck4"])
def test_a_pool_forced_to_one_expert_is_that_expert_alone(base, mixed_pool, name):
    ids = make_ids(rows=2)
    plain = logits_of(base.model, ids)
    expert = next(expert for expert in mixed_pool.experts if expert.name == name)
    if expert.kind == "bottleneck":
        with applied(base.model, expert.modules, ModifiedLinear):
            wanted = logits_of(base.model, ids)
    else:
        wanted = logits_of(peft_model(base, expert.directory), ids)
    assert not torch.allclose(wanted, plain, atol=0.1)
    for pool, router in (
        (mixed_pool.select([name]), "phatgoose"),
        (mixed_pool, f"single:expert={name}"),
    ):
        assert_same_logits(logits_of(compose(pool, base, router=router), ids), wanted)
        detach(base.model)
    assert torch.equal(logits_of(base.model, ids), plain)
