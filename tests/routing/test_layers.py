"""Layers of several kinds, ranks and sizes of expert: each alone is itself, together they mix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixed_experts import CPU, PRECISE, mixed_output
from oracle import token_weights
from phatgoose.config import ACTIVATIONS
from phatgoose.experts.alone import applied
from phatgoose.experts.bottleneck import BottleneckLayers
from phatgoose.experts.ia3 import ScalingVector
from phatgoose.experts.lora import LoraFactors
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.routers.fixed import Merged
from phatgoose.routing.routers.router import RouterAtSite
from phatgoose.routing.stacks import stack_of
from phatgoose.sites import Site
from tiny import assert_same_logits, logits_of, make_ids, peft_model, random

each_kind = pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])


@each_kind
@pytest.mark.parametrize("k", [1, 2, 8, None])
def test_every_layer_is_the_mixture_written_out(base, mixed_pool, k):
    """With k None they are merged: the mean of what each adds."""
    router = "phatgoose" if k else "merged"
    model, experts = compose(mixed_pool, base, k=k, router=router), mixed_pool.experts
    parts = set()
    for site, layer in composition_of(model).layers.items():
        u = random(6, layer.in_features)
        merged = {z: 1 / 8 for z, expert in enumerate(experts) if site in expert.modules}
        wanted = [
            mixed_output(
                layer.base, t, experts, token_weights(t, experts, site, k) if k else merged, site
            )
            for t in u
        ]
        torch.testing.assert_close(layer(u), torch.stack(wanted).float(), **PRECISE)
        parts.add(frozenset(layer.stack.rows()))
    assert {"lora", "input", "bottleneck"} in parts
    assert {"lora", "output"} in parts


@each_kind
@pytest.mark.parametrize("name", ["lora0", "biased1", "ia32", "bottleneck4"])
def test_a_pool_forced_to_one_expert_is_that_expert_alone(base, mixed_pool, name):
    ids = make_ids(rows=2)
    plain = logits_of(base.model, ids)
    expert = mixed_pool[name]
    if expert.kind == "bottleneck":
        with applied(base.model, expert.modules):
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


# Stacks


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 5))
@settings(max_examples=25)
def test_any_stack_of_modules_is_their_sum(seed, tokens):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def whole(most: int, least: int = 1) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    n, d = whole(6), whole(6)

    def any_module() -> LoraFactors | ScalingVector | BottleneckLayers:
        kind, m = whole(5), whole(4)
        if kind <= 2:
            bias = normal(d) if kind == 2 else None
            return LoraFactors(normal(m, n), normal(d, m), float(normal(1)), bias)
        if kind <= 4:
            return ScalingVector(normal(n if kind == 3 else d), on_input=kind == 3)
        activation = ACTIVATIONS[whole(2, 0)]
        return BottleneckLayers(normal(m, d), normal(m), normal(d, m), normal(d), activation, 0.5)

    modules = [any_module() for _ in range(whole(6))]
    base, u = nn.Linear(n, d), normal(tokens, n)
    experts = [SimpleNamespace(modules={"site": module}) for module in modules]
    stack = stack_of(SimpleNamespace(experts=experts), "site", torch.float32, CPU)
    rows = [row for rows in stack.rows().values() for row in rows.tolist()]
    assert sorted(rows) == list(range(len(modules)))
    router = RouterAtSite(Merged(), "site", stack.experts, "abcdefghijkl"[: len(modules) + 1], {})
    layer = RoutedLinear(base, Site("site", n, d, "decoder"), stack, router)
    weights = dict.fromkeys(range(len(modules)), 1 / (len(modules) + 1))
    wanted = torch.stack([mixed_output(base, t, experts, weights, "site") for t in u])
    torch.testing.assert_close(layer(u), wanted.float(), rtol=1e-4, atol=1e-4)


def test_bottlenecks_of_several_sizes_are_filled_up_with_zeros():
    def layers(m: int) -> BottleneckLayers:
        return BottleneckLayers(random(m, 6), random(m), random(6, m), random(6), "silu", 2.0)

    small, large = layers(2), layers(9)
    experts = [SimpleNamespace(modules={"site": each}) for each in (small, large)]
    pool = SimpleNamespace(experts=experts)
    stack = stack_of(pool, "site", torch.float32, CPU).parts["bottleneck"]
    assert stack.down.shape == stack.up.shape == (2, 9, 6)
    assert not stack.down[0, 2:].any()
    assert torch.equal(stack.up[0, :2], (2.0 * small.up).T)
    y = random(4, 6)
    wanted = small.at(y).apply(nn.Identity(), y) - y
    for body in (stack.side_by_side, stack.grouped):  # of few experts, and of many
        got = body(y, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
        torch.testing.assert_close(got, wanted, **PRECISE)
