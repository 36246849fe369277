"""Router single: the expert that is named."""

from __future__ import annotations

import pytest

from phatgoose.errors import ConfigError, PoolError
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from tiny import assert_same_logits, logits_of, make_ids


def test_single_is_the_expert_it_names(base, pool):
    ids = make_ids(rows=2)
    for name in ("e0", "e2"):
        wanted = logits_of(compose(pool.select([name]), base, k=1), ids)
        detach(base.model)
        model = compose(pool, base, router="single", expert=name)
        assert composition_of(model).experts == (name,)
        assert_same_logits(logits_of(model, ids), wanted)
        detach(model)


def test_single_needs_a_name_unless_there_is_one_expert(llama, llama_pool):
    with pytest.raises(PoolError, match="the name of its expert: one of e0, e1, e2, e3"):
        compose(llama_pool, llama, router="single")
    with pytest.raises(PoolError, match="no expert 'e9'"):
        compose(llama_pool, llama, router="single", expert="e9")
    with pytest.raises(PoolError, match="no expert 'e1'"):
        compose(llama_pool, llama, router="single", expert="e1", leave_out=["e1"])
    with pytest.raises(ConfigError, match="expert is for router single; the router is merged"):
        compose(llama_pool, llama, router="merged", expert="e1")
    model = compose(llama_pool, llama, router="single", keep=["e1"])
    assert composition_of(model).experts == ("e1",)
