"""What is served, and what the routes call: routings composed beside others, in turns, in time."""

import asyncio
import threading
from unittest.mock import MagicMock

import pytest

from phatgoose.apps.server import ServedModel, create_app, keys_of, served_models
from phatgoose.apps.server.local.runner import LoadedModel
from phatgoose.apps.server.protocol import Deadline, RoutingOverride
from phatgoose.apps.server.replies import Progress, Reply
from phatgoose.apps.server.service import Turns
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, PhatgooseError
from serving import GREEDY, PATH, ask, beside, error_of, folder_of, until


def test_others_are_served_while_a_routing_is_composed(guarded, monkeypatch):
    routings, go_on = guarded.app.state.service.routings, threading.Event()
    called, composed = threading.Event(), LoadedModel.composed

    def waits(*arguments):
        called.set()
        assert go_on.wait(30)
        return composed(*arguments)

    def status(key, **change):
        headers = {"Authorization": f"Bearer {key}"}
        return guarded.post(PATH, json={**GREEDY, **change}, headers=headers).status_code

    monkeypatch.setattr(LoadedModel, "composed", waits)
    begun = [beside(status, "secret", k=k) for k in (1, 1, 3)]
    assert called.wait(30)
    until(lambda: len(routings.turns) == 2)
    assert (status("other"), status("secret")) == (200, 200)
    go_on.set()
    assert [each.result() for each in begun] == [200] * 3
    until(lambda: not any(each.requests for each in routings.cached.values()))
    assert len(routings.cached) == 2


def test_routings_are_kept_and_make_room_for_each_other(client):
    service = client.app.state.service
    goose, routings = service.models["goose"], service.routings

    async def acquired(k):
        return await routings.acquire(goose, RoutingOverride(k=k), "somebody", Deadline(60))

    def acquire(k):
        return client.portal.call(acquired, k)

    for k in (1, 3, 4, 1):
        ask(client, **GREEDY, k=k)
    assert len(routings.cached) == 2
    assert acquire(1) is acquire(1)
    assert acquire(2).runner is goose.runner
    with acquire(1), acquire(3):
        assert "routings" in error_of(client, 429, **GREEDY, k=4)["message"]
    ask(client, **GREEDY, k=4)
    layers = [each.runner.model.phatgoose.layers for each in routings.cached.values()]
    for name, layer in goose.parts.layers.items():
        assert all(each[name].A is layer.A for each in layers)  # in memory once


def test_what_work_raises_arrives_and_the_next_is_done():
    def work(_):
        raise BaseException("no")  # as errors of compiled Rust are

    async def done():
        readers = Turns(1)
        with pytest.raises(RuntimeError, match="no"):
            await readers.run("a", Deadline(30), work)
        return await readers.run("a", Deadline(30), lambda _: 5)

    assert asyncio.run(done()) == 5


@pytest.mark.parametrize("turns", range(4))
def test_a_reply_that_is_cancelled_as_a_part_arrives_ends(turns):
    """asyncio.wait_for would go on waiting in Python 3.11, and the server would never exit."""

    async def cancelled():
        reply = Reply(MagicMock(answers=2), Deadline(60))
        task = asyncio.create_task(reply.whole())
        for turn in range(4):
            await asyncio.sleep(0)
            if turn == turns:
                reply.events.put_nowait(Progress(0, "a"))
                task.cancel()
        await asyncio.wait({task}, timeout=1)
        return task.cancelled()

    assert asyncio.run(cancelled())


# How an operator names models and keys.


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
