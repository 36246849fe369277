"""Routings that requests ask for: composed beside other answers, kept, and evicted."""

from __future__ import annotations

import math

import pytest

import serving
from phatgoose.apps.server.models import LoadedModel, RoutingOverride
from phatgoose.apps.server.protocol import Deadline
from phatgoose.config import Serving
from phatgoose.errors import ConfigError

GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}


PATH = "/v1/completions"
NEVER = Deadline(math.inf, math.inf)


def test_others_are_served_while_a_routing_is_composed(guarded, monkeypatch):
    """Its own client may have two on their way, all of them so many; what is there goes on."""
    routings = guarded.app.state.service.routings

    def ask(key, **change):
        headers = {"Authorization": f"Bearer {key}"}
        return guarded.post(PATH, json={**GREEDY, **change}, headers=headers)

    with serving.blocked(monkeypatch, LoadedModel, "compose") as (called, go_on):
        begun = [serving.in_a_thread(ask, "secret", k=k) for k in (1, 1, 3)]
        assert called.wait(30)
        serving.until(lambda: routings.unfinished == 2)
        assert ask("other").status_code == 200
        assert ask("secret").status_code == 200
        refused = ask("secret", k=4)
        assert refused.status_code == 429
        assert "Retry-After" in refused.headers
        go_on.set()
        for thread, found in begun:
            thread.join()
            assert found[0].status_code == 200
    assert ask("secret", k=4).status_code == 200
    serving.until(lambda: routings.requests == 0)
    assert len(routings.composed) == 3


def test_a_routing_that_takes_too_long_is_not_waited_for(pool, monkeypatch):
    app = serving.app_of(pool, Serving(timeout=1))
    routings = app.state.service.routings
    with serving.client_of(app) as client:
        with serving.blocked(monkeypatch, LoadedModel, "compose") as (_, go_on):
            reply = client.post(PATH, json={**GREEDY, "k": 1})
            assert reply.status_code == 504
            assert client.post(PATH, json=GREEDY).status_code == 200
            go_on.set()
        serving.until(lambda: routings.composed and not routings.unfinished)
        serving.until(lambda: routings.requests == 0)
        assert client.post(PATH, json={**GREEDY, "k": 1}).status_code == 200


def test_a_routing_that_fails_fails_for_all_who_wait(client, app, monkeypatch):
    routings = app.state.service.routings
    before = len(routings.composed)

    def fails(*_):
        raise ConfigError("nothing at /home/me/experts")

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "compose", fails)
        reply = client.post(PATH, json={**GREEDY, "k": 1})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "nothing at experts"
    assert (len(routings.composed), routings.unfinished) == (before, 0)
    assert client.post(PATH, json={**GREEDY, "k": 1}).status_code == 200


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


def test_routings_are_kept_and_make_room_for_each_other(app, client):
    goose, routings = app.state.service.models["goose"], app.state.service.routings

    def acquire(k):
        return client.portal.call(routings.acquire, goose, RoutingOverride(k=k), "somebody", NEVER)

    for k in (1, 3, 4, 1):
        ask(client, **GREEDY, k=k)
    assert len(routings.composed) == 2
    one, other = acquire(1), acquire(3)
    again = acquire(1)
    assert again.runner is one.runner
    assert acquire(2).runner is goose.runner
    again.release()
    error = error_of(client, 429, **GREEDY, k=4)
    assert "routings" in error["message"]
    for each in (one, other):
        each.release()
    ask(client, **GREEDY, k=4)
    layers = [runner.model.phatgoose.layers for runner in routings.composed]
    for name, layer in goose.parts.layers.items():
        assert all(each[name].A is layer.A for each in layers)  # in memory once
