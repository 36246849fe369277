"""Places, names, routings and keys as an operator writes them."""

from __future__ import annotations

import pytest

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server import keys_of, served_models
from phatgoose.config import Routing
from phatgoose.errors import ConfigError


@pytest.mark.parametrize("place", ["a/b\x1b[31m", "x\ny=experts", "x\u202ey=experts"])
def test_models_have_names_that_can_be_shown(place):
    with pytest.raises(ConfigError, match="NAME=PLACE"):
        served_models([place])


def test_keys_are_read_from_a_list():
    assert keys_of(" a, b,,") == ("a", "b")
    assert keys_of(None) == ()
    assert keys_of("b", ["a,c ", "d"]) == ("a,c", "d", "b")
    with pytest.raises(ConfigError, match="An API key is empty"):
        keys_of("b", [""])


def test_places_name_models_and_their_routing(tmp_path):
    odd = tmp_path / "a=b?c"
    odd.mkdir()
    models = served_models(
        [
            "x/experts",
            "mine=pool.json",
            "hub:me/x@v1",
            str(odd),
            "arrow=experts?router=arrow:form=peft&k=3",
        ],
        routing=Routing(kernel="gather"),
    )
    assert [(model.name, model.place) for model in models] == [
        ("experts", "x/experts"),
        ("mine", "pool.json"),
        ("me/x@v1", "hub:me/x@v1"),
        ("a=b?c", str(odd)),
        ("arrow", "experts"),
    ]
    assert [model.routing for model in models[:4]] == [Routing(kernel="gather")] * 4
    assert models[4].routing == Routing("arrow:form=peft", 3, "gather")


def test_every_setting_of_a_routing_is_read_as_its_type():
    (model,) = served_models(["x?k=3&kernel=concat&embedder=7"], routing=Routing("arrow", k=4))
    assert model.routing == Routing("arrow", 3, "concat", "7")


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([], "no model"),
        (["a/x", "b/x"], "NAME=PLACE"),
        (["x?router"], "router=NAME"),
        (["x?k=two"], "k is 'two'"),
        (["x?rooter=arrow"], "unknown setting 'rooter'"),
        (["x?k="], "k is '', but must be a whole number"),
        (["x?stand_in=true"], "stand_in has left phatgoose"),
        (["x?k=2&router=arrow&k=3"], "'k' is given 2 times"),
    ],
    ids=str,
)
def test_places_that_make_no_sense_are_refused(places, said):
    with pytest.raises(ConfigError, match=said):
        served_models(places)
