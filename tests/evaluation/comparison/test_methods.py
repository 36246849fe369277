"""The methods of a comparison follow from the registry of routers."""

from __future__ import annotations

from phatgoose.evaluation.comparison.methods import DERIVED, METHODS, label_with_settings
from phatgoose.routing.routers.registry import ROUTERS


def test_there_is_a_method_for_every_router_and_the_base():
    assert set(METHODS) == {"base", *ROUTERS} - {"single"}
    assert list(METHODS)[-2:] == list(DERIVED)
    assert list(METHODS).index("phatgoose") < list(METHODS).index("phatgoose-input")


def test_a_label_names_every_setting_that_is_not_the_usual_one():
    usual = {"router": "discriminant", "reading_place": "both", "input_k": None, "kernel": "auto"}
    assert label_with_settings(usual) == "Discriminant"
    changed = usual | {"reading_place": "end", "input_k": 3}
    assert label_with_settings(changed) == "Discriminant, reading place = end, input k = 3"
