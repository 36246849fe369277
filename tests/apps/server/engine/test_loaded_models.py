"""Served models: what they share, and whose experts they may have."""

from __future__ import annotations

import json
import shutil

import pytest

import serving
from phatgoose.apps.server import ServedModel, create_app, served_models
from phatgoose.apps.server.models import _Bases
from phatgoose.base.fingerprint import BaseReference
from phatgoose.base.loading import load_base
from phatgoose.config import Routing, Serving
from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.saved.save import save


def test_weights_of_a_base_are_in_memory_once(pool_of):
    app = serving.app_of(pool_of("llama"))
    goose, mean = (served.runner.model for served in app.state.service.models.values())
    assert goose is not mean
    pairs = zip(goose.parameters(), mean.parameters(), strict=True)
    assert all(one is other for one, other in pairs)


PROMPT = "to be or not"


GREEDY = {"model": "goose", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def app(pool):
    return serving.app_of(pool, Serving(max_routings=2, max_queue=40))


@pytest.fixture(scope="module")
def client(app):
    with serving.client_of(app, raise_server_exceptions=False) as client:
        yield client


def ask(client, status=200, path="/v1/completions", **body):
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def error_of(client, status=400, **body):
    return ask(client, status, **body)["error"]


def test_what_a_saved_model_says_of_its_experts_places_is_opened_for_nobody(
    pool, tmp_path, monkeypatch
):
    """It may come from a stranger, and who asks to reroute it may be one."""
    save(compose(pool, load_base(pool.base.id, dtype="float32"), k=1), tmp_path / "routed")
    info = json.loads((tmp_path / "routed" / "routed.json").read_text())
    info["experts"][0]["path"] = "hub:stranger/expert"
    (tmp_path / "routed" / "routed.json").write_text(json.dumps(info))
    other = pool.select(leave_out=[pool.names[0]])
    other.write_manifest(tmp_path / "fewer.json")
    places = [str(tmp_path / "routed"), str(tmp_path / "fewer.json")]
    app = create_app(served_models(places, dtype="float32"))
    with serving.client_of(app) as client:
        opened = []
        monkeypatch.setattr(Pool, "open", opened.append)
        asked = {**GREEDY, "model": "routed"}
        for change in ({"k": 2}, {"keep": [pool.names[1]]}, {"router": "merged"}):
            message = error_of(client, **asked, **change)["message"]
            assert "only while a pool with its experts" in message
        ask(client, **asked)
    assert opened == []


def test_settings_that_a_model_cannot_have_are_refused(pool):
    with pytest.raises(ConfigError, match="is not a pool"):
        create_app([ServedModel("b", pool.base.id, Routing())])
    for routing, told in (
        (Routing("oracle"), "goes by the task's name"),
        (Routing("retrieval:form=paper"), "form=paper embeds answer choices"),
    ):
        with pytest.raises(ConfigError, match=told):
            create_app([ServedModel("b", str(serving.folder_of(pool)), routing)])


def test_a_saved_model_that_goes_by_more_than_prompts_is_refused(pool, tmp_path):
    scores = {name: {"task": z} for z, name in enumerate(pool.names)}
    base = load_base(pool.base.id, dtype="float32")
    save(compose(pool, base, router="oracle", scores=scores), tmp_path / "routed")
    with pytest.raises(ConfigError, match="goes by the task's name"):
        create_app(served_models([str(tmp_path / "routed")], dtype="float32"))


def test_equal_weights_by_another_name_have_that_one_s_tokenizer(base_folders, tmp_path):
    """Whichever of them was loaded first: a chat template, say, is the folder's own."""
    other = shutil.copytree(base_folders["llama"], tmp_path / "chatty")
    tokenizer = load_base(other, dtype="float32").tokenizer
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    for first, second in ((base_folders["llama"], other), (other, base_folders["llama"])):
        bases = _Bases()
        one = bases.get(BaseReference(str(first)), "float32")
        two = bases.get(BaseReference(str(second), fingerprint=one.fingerprint), "float32")
        assert two.model is one.model
        assert (one.id, two.id) == (str(first), str(second))
        for base in (one, two):
            assert bool(base.tokenizer.chat_template) == (base.id == str(other))
    gone = bases.get(BaseReference(str(tmp_path / "gone"), fingerprint=one.fingerprint), "float32")
    assert gone is one
