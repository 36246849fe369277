"""The guard of request bodies."""

from __future__ import annotations

import json

import pytest

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.guards import AT_ONCE, AccessControl, RequestBody, RequestGuard
from phatgoose.apps.server.protocol import ApiError

MIB = 1 << 20


GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}


JSON = {"Content-Type": "application/json"}


PATH = "/v1/completions"


def test_bodies_are_counted_together_and_let_go():
    gate = RequestGuard(None, AccessControl(), 100, 1)
    full = [RequestBody(gate, None) for _ in range(AT_ONCE)]
    for body in full:
        body.add(b"x" * 100)
    another = RequestBody(gate, None)
    with pytest.raises(ApiError) as refused:
        another.add(b"x")
    assert refused.value.status_code == 429
    for body in (*full, another, another):
        body.release()
    assert gate.held == 0
    with pytest.raises(ApiError) as refused:
        another.add(b"x" * 101)
    assert refused.value.status_code == 413


def test_bodies_are_let_go_whatever_became_of_the_request(client, app):
    gates = []
    layer = app.middleware_stack
    while layer is not None:
        gates += [layer] if isinstance(layer, RequestGuard) else []
        layer = getattr(layer, "app", getattr(layer, "_app", None))
    for body in (GREEDY, {**GREEDY, "model": "duck"}, {"x": 1}):
        client.post(PATH, json=body)
    client.post(PATH, content=b"{}" * MIB, headers=JSON)
    assert gates[0].held == 0


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json"],
)
def test_a_body_that_does_not_say_that_it_is_json_is_refused(client, kind):
    headers = {"Content-Type": kind} if kind else {}
    reply = client.post(PATH, content=json.dumps(GREEDY), headers=headers)
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/vnd.api+JSON"])
def test_other_ways_to_say_json_are_understood(client, kind):
    reply = client.post(PATH, content=json.dumps(GREEDY), headers={"Content-Type": kind})
    assert reply.status_code == 200
