"""The methods of a comparison follow from the registry of routers."""

from __future__ import annotations

from phatgoose.evaluation.comparison.methods import (
    DERIVED,
    METHODS,
    label_with_settings,
    routing_of,
)
from phatgoose.routing.routers.registry import ROUTERS


def test_there_is_a_method_for_every_router_and_the_base():
    assert set(METHODS) == {"base", *ROUTERS} - {"single"}
    assert list(METHODS)[-2:] == list(DERIVED)


def test_a_label_names_every_setting_that_is_not_the_usual_one():
    own = {"router": "discriminant", "k": 1, "kernel": "auto", "pool": ["a"]}
    assert label_with_settings(own) == "Discriminant"
    changed = own | {"router": "discriminant:place=end,task_variance=0.1", "k": 3}
    assert label_with_settings(changed) == "Discriminant, place = end, task variance = 0.1, k = 3"


def test_identities_of_the_time_of_one_routing_for_all_are_those_of_now():
    """Also of what has left: results are there to be looked at."""
    then = {"router": "discriminant", "reading_place": "end", "input_k": None, "kernel": "auto"}
    assert label_with_settings(then) == "Discriminant, place = end"
    assert routing_of(then) == {"router": "discriminant:place=end", "k": 1, "kernel": "auto"}
    then = {"router": "phatgoose", "k": 1, "affinity": "centred", "pool": ["a"]}
    assert label_with_settings(then) == "PHATGOOSE, affinity = centred, k = 1"
    assert (
        label_with_settings({"router": "phatgoose-input", "eps": 0.1})
        == "phatgoose-input, eps = 0.1"
    )
