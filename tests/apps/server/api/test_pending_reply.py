"""Replies that take too long and clients that go away."""

from __future__ import annotations

import json
from contextlib import closing
from http.client import HTTPConnection

import pytest

import serving
from phatgoose.config import Serving

PROMPT = "to be or not"


GREEDY = {"model": "goose", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}


LONG = {**GREEDY, "max_tokens": 1000}


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


def endless(app):
    for served in app.state.service.models.values():
        served.runner.ends = frozenset()
    return app


def test_a_request_that_takes_too_long_is_ended(pool):
    app = endless(serving.app_of(pool, Serving(timeout=1, max_tokens=2000)))
    engine, wish = app.state.service.engine, {**LONG, "max_tokens": 1990}
    with serving.client_of(app) as client:
        with serving.held(2):
            assert error_of(client, 504, **wish)["code"] == "timeout"
        serving.until(lambda: engine.running == 0)
        with (
            serving.held(2),
            client.stream("POST", "/v1/completions", json={**wish, "stream": True}) as reply,
        ):
            lines = [line for line in reply.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        serving.until(lambda: engine.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(pool, stream):
    app = endless(serving.app_of(pool))
    engine, routings = app.state.service.engine, app.state.service.routings

    def post(client, **body):
        headers = {"Content-Type": "application/json"}
        client.request("POST", "/v1/completions", json.dumps(body), headers)

    with (
        serving.running(app) as address,
        closing(HTTPConnection(address.removeprefix("http://"), timeout=60)) as client,
    ):
        with serving.held(2):
            post(client, **LONG, stream=stream, k=1)
            if stream:
                with client.getresponse() as reply:
                    assert reply.readline().startswith(b"data: ")
            serving.until(lambda: engine.running == 1)
            (row,) = [row for batch in engine._batches for row in batch.sequences]
            client.close()
            serving.until(lambda: row.is_cancelled)
        serving.until(lambda: engine.running == engine.waiting == 0)
        serving.until(lambda: routings.requests == 0)
        post(client, **GREEDY)
        with client.getresponse() as reply:
            assert reply.status == 200
