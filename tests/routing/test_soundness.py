"""Tensors of a routed model, held against its base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.growing import add_experts
from tiny import logits_of, make_ids


def times(expert: Expert, factor: float, site: str) -> Expert:
    """The expert with its B at one site times `factor`."""
    lora = expert.lora[site]
    return replace(expert, modules={**expert.modules, site: replace(lora, B=lora.B * factor)})


def with_changed(pool: Pool, factor: float) -> tuple[Pool, str]:
    """The pool whose e2 has a B times `factor` at one site, and that site's name."""
    site = pool.sites[3]
    return Pool((*pool.experts[:2], times(pool.experts[2], factor, site), pool.experts[3])), site


@pytest.mark.parametrize("router", ["merged", "phatgoose"])
@pytest.mark.parametrize(
    ("factor", "dtype"), [(1e30, "float32"), (1e30, "bfloat16"), (1e6, "half")]
)
def test_an_update_that_overflows_is_refused_by_name(llama, llama_pool, router, factor, dtype):
    pool, site = with_changed(llama_pool, factor)
    llama.model.to(getattr(torch, dtype))
    with pytest.raises(RoutingError, match=rf"Expert 'e2' at {site}: .* numbers of (\d|inf)"):
        compose(pool, llama, router=router)
    compose(llama_pool, llama, router=router)


def test_an_update_that_overflows_does_not_join(llama, llama_pool):
    model = compose(Pool(llama_pool.experts[:2]), llama, router="phatgoose")
    before = logits_of(model, make_ids())
    pool, site = with_changed(llama_pool, 1e30)
    with pytest.raises(RoutingError, match=rf"Expert 'e2' at {site}"):
        add_experts(model, Pool(pool.experts[2:]))
    assert torch.equal(logits_of(model, make_ids()), before)


def test_large_factors_with_a_usable_product_are_none_too_large(llama, llama_pool):
    site, first = llama_pool.sites[0], llama_pool.experts[0]
    lora = first.lora[site]
    scaled = replace(lora, A=lora.A * 1e-25, B=lora.B * 1e25)
    pool = Pool((replace(first, modules={**first.modules, site: scaled}),))
    wanted = logits_of(
        compose(Pool((first,)), llama, k=1, kernel="reference", router="phatgoose"), make_ids()
    )
    detach(llama.model)
    got = logits_of(compose(pool, llama, k=1, kernel="reference", router="phatgoose"), make_ids())
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_a_mean_that_overflows_in_a_weight_is_refused(llama, pool_of):
    pool = pool_of("llama", (4,) * 9)
    llama.model.half()
    site = pool.sites[0]
    llama.model.get_submodule(site).weight.data.fill_(65504)
    changed = Pool(tuple(times(expert, 300, site) for expert in pool.experts))
    with pytest.raises(RoutingError, match=f"The mean of all experts at {site}"):
        compose(changed, llama, router="merged")
