"""Stacks: experts of several kinds, ranks and sizes side by side, and the sums over chosen ones."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixed_experts import CPU, PRECISE, mixed_output
from phatgoose.config import ACTIVATIONS
from phatgoose.experts.bottleneck import BottleneckLayers
from phatgoose.experts.ia3 import ScalingVector
from phatgoose.experts.lora import LoraFactors
from phatgoose.routing.layers import RoutedLinear, stack_modules
from phatgoose.routing.routers.fixed import Merged
from phatgoose.routing.routers.router import SiteRouter
from phatgoose.sites import Site


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
    stack = stack_modules(range(len(modules)), modules, torch.float32, CPU)
    rows = [row for rows in stack.rows().values() for row in rows.tolist()]
    assert sorted(rows) == list(range(len(modules)))
    router = SiteRouter(Merged(), "site", stack.experts, len(modules) + 1, {})
    layer = RoutedLinear(base, Site("site", n, d, "decoder"), stack, router)
    weights = dict.fromkeys(range(len(modules)), 1 / (len(modules) + 1))
    experts = [SimpleNamespace(modules={"site": module}) for module in modules]
    wanted = torch.stack([mixed_output(base, t, experts, weights, "site") for t in u])
    torch.testing.assert_close(layer(u), wanted.float(), rtol=1e-4, atol=1e-4)


def test_bottlenecks_of_several_sizes_are_filled_up_with_zeros():
    def layers(m: int) -> BottleneckLayers:
        parts = (torch.randn(m, 6), torch.randn(m), torch.randn(6, m), torch.randn(6))
        return BottleneckLayers(*parts, "silu", 2.0)

    small, large = layers(2), layers(9)
    stack = stack_modules([0, 1], [small, large], torch.float32, CPU).parts["bottleneck"]
    assert stack.down.shape == stack.up.shape == (2, 9, 6)
    assert not stack.down[0, 2:].any()
    assert torch.equal(stack.up[0, :2], (2.0 * small.up).T)
    y = torch.randn(4, 6)
    wanted = small.at(y).apply(nn.Identity(), y) - y
    for body in (stack.side_by_side, stack.grouped):  # of few experts, and of many
        got = body(y, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
        torch.testing.assert_close(got, wanted, **PRECISE)
