"""Served models: how an operator names them, what they share, whose experts they may have."""

import json
import shutil

import pytest

import serving
from phatgoose.apps.server import ServedModel, create_app, keys_of, served_models
from phatgoose.base import load_base
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, PhatgooseError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, save
from serving import GREEDY, ask, error_of, text_of


def test_what_a_saved_model_says_of_its_experts_places_is_opened_for_nobody(
    pool, tmp_path, monkeypatch
):
    """It may come from a stranger, and who asks to reroute it may be one."""
    save(
        compose(pool, load_base(pool.base.id, dtype="float32"), k=1, router="phatgoose"),
        tmp_path / "routed",
    )
    info = json.loads((tmp_path / "routed" / "routed.json").read_text())
    info["experts"][0]["path"] = "hub:stranger/expert"
    (tmp_path / "routed" / "routed.json").write_text(json.dumps(info))
    for expert in pool.experts[1:]:
        shutil.copytree(expert.directory, tmp_path / "fewer" / expert.name)
    places = [str(tmp_path / "routed"), str(tmp_path / "fewer")]
    app = create_app(served_models(places, dtype="float32"))
    with serving.client_of(app) as client:
        opened = []
        monkeypatch.setattr(Pool, "open", opened.append)
        asked = {**GREEDY, "model": "routed"}
        for change in ({"k": 2}, {"keep": [pool.names[1]]}, {"router": "auto"}):
            message = error_of(client, **asked, **change)["message"]
            assert "its routing can't be changed" in message
        ask(client, **asked)
    assert opened == []


def test_settings_that_a_model_cannot_have_are_refused(pool):
    with pytest.raises(ConfigError, match="is not a pool"):
        create_app([ServedModel("b", pool.base.id, Routing(router="phatgoose"))])
    for routing, told in (
        (Routing("oracle"), "goes by the task's name"),
        (Routing("retrieval:form=paper"), "form=paper embeds answer choices"),
    ):
        with pytest.raises(ConfigError, match=told):
            create_app([ServedModel("b", str(serving.folder_of(pool)), routing)])
    with pytest.raises(PhatgooseError):
        create_app([ServedModel("x", str(serving.folder_of(pool) / "nothing.json"))])


def test_keys_are_read_from_a_list():
    assert keys_of(" a, b,,") == ("a", "b")
    assert keys_of(None) == ()


def test_places_name_models_and_their_routing(tmp_path):
    odd = tmp_path / "a=b?c"
    odd.mkdir()
    models = served_models(
        ["x/experts", "mine=pool.json", "hub:me/x@v1", str(odd), "a=e?router=arrow:form=peft&k=3"],
        routing=Routing(kernel="gather", router="phatgoose"),
    )
    assert [(model.name, model.place) for model in models] == [
        ("experts", "x/experts"),
        ("mine", "pool.json"),
        ("me/x@v1", "hub:me/x@v1"),
        ("a=b?c", str(odd)),
        ("a", "e"),
    ]
    assert [model.routing for model in models[:4]] == [
        Routing(kernel="gather", router="phatgoose")
    ] * 4
    assert models[4].routing == Routing("arrow:form=peft", 3, "gather")
    for places, said in ((["a/x", "b/x"], "NAME=PLACE"), (["x?k=two"], "k is 'two'")):
        with pytest.raises(ConfigError, match=said):
            served_models(places)


def test_mixtures_of_several_sizes_share_a_batch(client):
    mixtures = [{"e0": 1}, {"e0": 0.5, "e1": 0.5}, {"e1": 1, "e2": -0.4, "e3": 0.1}, {"e2": 0}]
    alone = [text_of(client, **GREEDY, weights=each) for each in mixtures]
    with serving.held(1) as go_on:
        running = [serving.in_a_thread(text_of, client, **GREEDY, weights=w) for w in mixtures]
        engine = client.app.state.service.backend.engine
        serving.until(lambda: engine.running + engine.waiting == 4)
        go_on.set()
        for thread, _ in running:
            thread.join()
    assert [found[0] for _, found in running] == alone
