"""What the routes call."""

from __future__ import annotations

import asyncio

import pytest

import serving
from phatgoose.apps.server.api import service
from phatgoose.apps.server.engine.routing_cache import RoutingCache
from phatgoose.config import Serving

GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}


PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("owner", "step"), [(service, "parsed"), (service.RequestPreparer, "completion_prompts")]
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
