"""What every router checks of its settings and its pool."""

from __future__ import annotations

import pytest

from phatgoose.routing.compose import compose, detach
from routed_models import compose_by


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow", "random"])
def test_a_k_above_the_pool_is_told_where_k_matters(llama, llama_pool, router):
    with pytest.warns(UserWarning, match="k is 5, but the pool has 4 experts"):
        compose(llama_pool, llama, router=router, k=5)


@pytest.mark.parametrize("router", ["merged", "single", "oracle", "best-individual"])
def test_a_k_above_the_pool_is_not_told_where_k_does_not_matter(llama, llama_pool, router):
    compose_by(router, llama_pool, llama, k=5)


def test_the_default_k_is_lowered_without_a_word(llama, llama_pool):
    """Nobody asked for it; warnings are errors here."""
    compose(llama_pool, llama, keep=["e0"])
    with pytest.warns(UserWarning, match="k is 3, but the pool has 1 expert;"):
        compose(llama_pool, detach(llama.model), keep=["e0"], k=3)
