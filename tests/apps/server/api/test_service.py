"""What the routes call."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

import serving
from phatgoose.apps.server import ServedModel, create_app, service
from phatgoose.apps.server import models as loaded_models
from phatgoose.apps.server.service import RoutingCache
from phatgoose.base import untrusted_text
from phatgoose.config import Serving

GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}


PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("owner", "step"), [(service, "parsed"), (service.RequestPreparer, "prompts")]
)
def test_the_server_is_well_while_it_reads_a_request(client, monkeypatch, owner, step):
    with serving.blocked(monkeypatch, owner, step) as (called, go_on):
        large = {**GREEDY, "user": "x" * 20_000}
        thread, found = serving.in_a_thread(client.post, PATH, json=large)
        assert called.wait(30)
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/models").status_code == 200
        go_on.set()
        thread.join()
    assert found[0].status_code == 200


def test_composing_and_answering_share_the_time_of_a_request(pool, monkeypatch):
    """An answer has only what composing left of it, here nothing."""
    acquire = RoutingCache.acquire

    async def slow(self, *arguments):
        await asyncio.sleep(1.1)
        return await acquire(self, *arguments)

    monkeypatch.setattr(RoutingCache, "acquire", slow)
    app = serving.app_of(pool, Serving(timeout=1))
    with serving.client_of(app) as client:
        late = client.post(PATH, json=GREEDY)
    assert late.status_code == 504
    assert late.json()["error"]["message"] == "The answer took longer than 1 seconds."
    assert app.state.service.routings.requests == 0


def test_no_local_path_is_told(client, pool, app, monkeypatch):
    assert "/" in pool.base.id
    cards = client.get("/v1/models").json()["data"]
    assert {card["base"] for card in cards} == {pool.base.id.rpartition("/")[2]}
    reply = client.post(PATH, json={**GREEDY, "router": "retrieval"}).json()
    assert "embeddings" in reply["error"]["message"]
    assert str(serving.folder_of(pool)) not in str(reply)
    assert "/tmp" not in str(reply)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"keep": ["nobody"]}, "keep"),
        ({"router": "retrieval"}, "router"),
        ({"router": "retrieval", "keep": ["nobody"]}, None),
    ],
)
def test_the_field_that_asked_for_a_routing_is_named(client, change, param):
    reply = client.post(PATH, json={**GREEDY, **change})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


CHAT = {"model": "goose", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
HOSTILE = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{% set a = 9 %}{{ a ** (a ** a) }}",
    "doubled": (
        "{% set x = namespace(y='a' * 999) %}{% for i in range(60) %}{% set x.y = x.y + x.y %}"
        "{% endfor %}{{ x.y | length }}"
    ),
}


def two_bases(pool_of, limits=None):
    """An application that serves experts of one base as "goose", of another as "other"."""
    places = {"goose": pool_of("llama"), "other": pool_of("gpt2")}
    models = [
        ServedModel(name, str(serving.folder_of(pool)), dtype="float32")
        for name, pool in places.items()
    ]
    return create_app(models, limits)


def tokenizer_of(app):
    return app.state.service.models["goose"].runner.tokenizer


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_wants_everything_keeps_nobody_else_waiting(pool_of, monkeypatch, template):
    monkeypatch.setattr(untrusted_text, "SECONDS", 1)
    monkeypatch.setattr(untrusted_text, "MEMORY", 256 << 20)
    app = two_bases(pool_of)
    tokenizer_of(app).chat_template = template
    with serving.client_of(app) as client:
        asked = [
            serving.in_a_thread(client.post, "/v1/chat/completions", json=CHAT) for _ in range(3)
        ]
        serving.until(lambda: client.get("/healthz").json()["reading"])
        begun = time.monotonic()
        assert client.post(PATH, json={**GREEDY, "model": "other"}).status_code == 200
        answered = time.monotonic() - begun
        for thread, _ in asked:
            thread.join()
        whole = time.monotonic() - begun
        replies = [found[0] for _, found in asked]
        assert client.post(PATH, json=GREEDY).status_code == 200
        serving.until(lambda: not client.get("/healthz").json()["running"])
        health = client.get("/healthz").json()
    assert [reply.status_code for reply in replies] == [400] * 3
    error = replies[0].json()["error"]
    assert (error["param"], error["code"]) == ("messages", "prompt_unreadable")
    assert error["message"].startswith("The base's chat template failed: it took ")
    assert health == {
        "status": "ok",
        "waiting": 0,
        "running": 0,
        "reading": 0,
        "longest_reading": 0.0,
        "readers_stuck": 0,
        "readers_ended": 3,
    }
    assert template == HOSTILE["doubled"] or answered < whole


def test_the_server_stops_at_once_beside_a_template_that_takes_for_ever(pool_of):
    app = two_bases(pool_of)
    tokenizer_of(app).chat_template = HOSTILE["power"]
    with serving.client_of(app) as client:
        thread, found = serving.in_a_thread(client.post, "/v1/chat/completions", json=CHAT)
        serving.until(lambda: client.get("/healthz").json()["reading"])
        begun = time.monotonic()
        app.state.service.stop()
        thread.join(30)
        assert time.monotonic() - begun < untrusted_text.SECONDS
    assert found[0].json()["error"]["message"] == "The server was stopped."


def test_a_request_that_a_template_outlasts_is_a_504(pool_of):
    app = two_bases(pool_of, Serving(timeout=1))
    tokenizer_of(app).chat_template = HOSTILE["loop"]
    with serving.client_of(app) as client:
        late = client.post("/v1/chat/completions", json=CHAT)
        assert late.status_code == 504
        assert late.json()["error"]["message"] == "The answer took longer than 1 seconds."
        serving.until(lambda: not client.get("/healthz").json()["reading"])
        assert client.post(PATH, json=GREEDY).status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize("kind", ["normaliser", "expression"])
def test_a_tokenizer_that_wants_everything_is_an_error_of_its_request(pool_of, monkeypatch, kind):
    monkeypatch.setattr(untrusted_text, "SECONDS", 1)
    monkeypatch.setattr(untrusted_text, "MEMORY", 256 << 20)
    load = loaded_models.load_base

    def hostile(*arguments, **options):
        base = load(*arguments, **options)
        inner = base.tokenizer.backend_tokenizer
        if kind == "normaliser":
            inner.normalizer = normalizers.Replace("a", "b" * 10_000)
        else:
            splits = pre_tokenizers.Split(Regex("(a+a+)+y"), "isolated")
            inner.pre_tokenizer = pre_tokenizers.Sequence([splits, inner.pre_tokenizer])
        return base

    monkeypatch.setattr(loaded_models, "load_base", hostile)
    with serving.client_of(two_bases(pool_of)) as client:
        reply = client.post(PATH, json={**GREEDY, "prompt": "a" * 1000})
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["param"], error["code"]) == ("prompt", "prompt_unreadable")
        assert client.post(PATH, json={**GREEDY, "prompt": "b"}).status_code == 200


def test_a_reader_that_does_not_come_back_is_told(client, monkeypatch):
    monkeypatch.setattr(service, "STUCK", 0.05)
    preparer = service.RequestPreparer
    with serving.blocked(monkeypatch, preparer, "prompts") as (called, go_on):
        thread, found = serving.in_a_thread(client.post, PATH, json=GREEDY)
        assert called.wait(30)
        serving.until(lambda: client.get("/healthz").status_code == 503)
        health = client.get("/healthz").json()
        assert (health["status"], health["readers_stuck"]) == ("failing", 1)
        go_on.set()
        thread.join()
    assert found[0].status_code == 200
    assert client.get("/healthz").json()["status"] == "ok"
