"""Rows that are appended: copied now and then only."""

from __future__ import annotations

from growth_cases import assert_same_models, composed
from phatgoose.experts.pool import Pool
from phatgoose.routing.composition import composition_of
from phatgoose.routing.growing import add_experts
from phatgoose.routing.stacks import GROWTH


def test_growth_is_copied_now_and_then_only(llama, make_expert):
    experts = [make_expert(llama, f"x{z}", seed=z) for z in range(8)]
    model = composed("phatgoose", Pool(tuple(experts[:4])), llama)
    places = []
    for expert in experts[4:]:
        add_experts(model, Pool((expert,)))
        layer = next(iter(composition_of(model).layers.values()))
        places.append(layer.A.data_ptr())
        assert len(layer.room["A"]) <= GROWTH * 8
    assert places[0] == places[1] == places[2]  # room for 7 was made when the fifth came
    assert places[3] != places[2]
    assert_same_models(model, composed("phatgoose", Pool(tuple(experts)), llama))
