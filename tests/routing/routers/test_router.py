"""What every router checks of its settings and its pool."""

from __future__ import annotations

import pytest

from phatgoose.routing.compose import compose
from routed_models import compose_by


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow", "random"])
def test_a_k_above_the_pool_is_told_where_k_matters(llama, llama_pool, router):
    with pytest.warns(UserWarning, match="k is 5, but the pool has 4 experts"):
        compose(llama_pool, llama, router=router, k=5)


@pytest.mark.parametrize("router", ["merged", "single", "oracle", "best-individual"])
def test_a_k_above_the_pool_is_not_told_where_k_does_not_matter(llama, llama_pool, router):
    compose_by(router, llama_pool, llama, k=5)
