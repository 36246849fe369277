"""Served models: how an operator names them and their keys, and which can't be served."""

import pytest

from phatgoose.apps.server import ServedModel, create_app, keys_of, served_models
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, PhatgooseError
from serving import folder_of


@pytest.mark.parametrize(
    ("kind", "routing", "told"),
    [
        (None, Routing("phatgoose"), "is not a pool"),
        ("llama", Routing("oracle"), "goes by the task's name"),
        ("llama", Routing("retrieval:form=paper"), "form=paper embeds answer choices"),
        ("t5", Routing(), "doesn't serve it"),  # an encoder-decoder model
    ],
)
def test_models_that_cannot_be_served_are_refused(pool_of, kind, routing, told):
    place = str(folder_of(pool_of(kind))) if kind else pool_of("llama").base.id
    with pytest.raises(PhatgooseError, match=told):
        create_app([ServedModel("b", place, routing, dtype="float32")])


def test_keys_are_read_from_a_list():
    assert keys_of(" a, b,,") == ("a", "b")
    assert keys_of(None) == ()


def test_places_name_models_and_their_routing(tmp_path):
    odd, usual = tmp_path / "a=b?c", Routing(kernel="gather", router="phatgoose")
    odd.mkdir()
    places = ["x/experts", "mine=pool.json", "hub:me/x@v1", str(odd)]
    *models, last = served_models([*places, "a=e?router=arrow:form=peft&k=3"], routing=usual)
    assert [(model.name, model.place, model.routing) for model in models] == [
        ("experts", "x/experts", usual),
        ("mine", "pool.json", usual),
        ("me/x@v1", "hub:me/x@v1", usual),
        ("a=b?c", str(odd), usual),
    ]
    assert last == ServedModel("a", "e", Routing("arrow:form=peft", 3, "gather"))
    for places, said in ((["a/x", "b/x"], "NAME=PLACE"), (["x?k=two"], "k is 'two'")):
        with pytest.raises(ConfigError, match=said):
            served_models(places)
