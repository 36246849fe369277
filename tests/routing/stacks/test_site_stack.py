"""All experts' modules at one site."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixed_experts import (
    CPU,
    mixed_output,
)
from phatgoose.base.sites import Site
from phatgoose.config import ACTIVATIONS
from phatgoose.experts.kinds.bottleneck import BottleneckLayers
from phatgoose.experts.kinds.ia3 import ScalingVector
from phatgoose.experts.kinds.lora import LoraFactors
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.routers.fixed import UniformRouter
from phatgoose.routing.stacks import stack_modules


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
    assert sorted(row for rows in stack.rows().values() for row in rows.tolist()) == list(
        range(len(modules))
    )
    router = UniformRouter(len(modules), len(modules) + 1)
    layer = RoutedLinear(base, Site("site", n, d, "decoder"), stack, router, "auto")
    weights = dict.fromkeys(range(len(modules)), 1 / (len(modules) + 1))
    experts = [Holder({"site": module}) for module in modules]
    wanted = torch.stack([mixed_output(base, t, experts, weights, "site") for t in u])
    torch.testing.assert_close(layer(u), wanted.float(), rtol=1e-4, atol=1e-4)


class Holder:
    """As much of an expert as a mixture looks at."""

    def __init__(self, modules):
        self.modules = modules
