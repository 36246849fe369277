"""The methods of a comparison follow from the registry of routers."""

from __future__ import annotations

from phatgoose.evaluation.comparison.methods import DERIVED, METHODS
from phatgoose.routing.routers.registry import ROUTERS


def test_there_is_a_method_for_every_router_and_the_base():
    assert set(METHODS) == {"base", *ROUTERS} - {"single"}
    assert list(METHODS)[-2:] == list(DERIVED)
    assert list(METHODS).index("phatgoose") < list(METHODS).index("phatgoose-input")
