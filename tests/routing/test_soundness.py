"""Tensors of a routed model, held against its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from phatgoose.base.sites import find_sites
from phatgoose.config import Routing
from phatgoose.errors import RoutingError
from phatgoose.routing.compose import routed_layer, stack_at
from phatgoose.routing.composition import Composition
from phatgoose.routing.stacks.site_stack import SiteStack

STACKS: dict[str, Callable[[SiteStack, Tensor], tuple[SiteStack, Tensor | None]]] = {
    "A narrowed": lambda s, v: (replace(s, lora=replace(s.lora, A=s.lora.A[..., :5])), v),
    "B of another rank": lambda s, v: (replace(s, lora=replace(s.lora, B=s.lora.B[:, :1])), v),
    "B widened": lambda s, v: (replace(s, lora=replace(s.lora, B=s.lora.B.repeat(1, 1, 9))), v),
    "experts of another pool": lambda s, v: (replace(s, experts=s.experts + 1), v),
    "fewer experts": lambda s, v: (replace(s, experts=s.experts[:1]), v),
    "fewer vectors": lambda s, v: (s, v[:-1]),
    "no vectors": lambda s, v: (s, None),
    "nobody": lambda s, v: (SiteStack(s.experts), v),
}


@pytest.mark.parametrize("how", STACKS)
def test_what_is_stacked_in_memory_is_checked_too(llama, llama_pool, how):
    model = llama.model
    site = next(iter(find_sites(model).values()))
    layer, stack = model.get_submodule(site.name), stack_at(model, site.name, llama_pool)
    parts = Composition(llama_pool.base, None, llama_pool.names, [], Routing())
    vectors = parts.router.state_at(llama_pool, site.name)["vectors"]
    assert routed_layer(layer, site, stack, {"vectors": vectors}, parts)
    changed, others = STACKS[how](stack, vectors)
    state = {} if others is None else {"vectors": others}
    with pytest.raises(RoutingError, match=f"Experts at {site.name}"):
        routed_layer(layer, site, changed, state, parts)
