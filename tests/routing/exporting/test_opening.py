"""Opening for an export: nothing is folded, saved models are loaded, a base alone is refused."""

from __future__ import annotations

import pytest

from phatgoose.config import Routing
from phatgoose.errors import ConfigError, RoutingError
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.export.export import open_routed
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.saved.save import save


def test_a_pool_is_opened_with_every_factor_and_a_saved_model_as_it_is(llama, pool_of, tmp_path):
    pool = pool_of("llama", (24, 9, 20))
    place = pool.experts[0].directory.parent
    options = {"dtype": "float32", "routing": Routing("merged")}
    model = open_routed(place, llama.id, keep=["e0", "e1"], **options)
    assert composition_of(model).experts == ("e0", "e1")
    assert {type(layer) for layer in composition_of(model).layers.values()} == {RoutedLinear}
    save(model, tmp_path / "routed")
    again = open_routed(tmp_path / "routed", dtype="float32")
    assert composition_of(again).experts == ("e0", "e1")
    with pytest.raises(RoutingError, match="neither a routed model nor a pool"):
        open_routed(llama.id)


def test_experts_are_chosen_of_pools_alone(llama, llama_pool, tmp_path):
    save(compose(llama_pool, llama, router="merged"), tmp_path / "routed")
    for chosen in ({"keep": ["e0"]}, {"leave_out": ["e0"]}, {"scores": {"e0": {"t": 1.0}}}):
        with pytest.raises(ConfigError, match="is not a pool"):
            open_routed(tmp_path / "routed", **chosen)
