"""What the routes call: requests read and routings composed beside others, in turns, in time."""

import asyncio
import threading
from unittest.mock import MagicMock

import pytest

from phatgoose.apps.server.local.runner import LoadedModel
from phatgoose.apps.server.protocol import Deadline, RoutingOverride
from phatgoose.apps.server.replies import Progress, Reply
from phatgoose.apps.server.service import Turns
from serving import GREEDY, PATH, ask, beside, error_of, until


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


class Panic(BaseException):
    """As errors of compiled Rust are."""


@pytest.mark.parametrize(
    ("error", "wanted"), [(ValueError("no"), ValueError), (Panic("no"), RuntimeError)]
)
def test_what_work_raises_arrives_and_the_next_is_done(error, wanted):
    def work(_):
        raise error

    async def done():
        readers = Turns(1)
        with pytest.raises(wanted, match="no"):
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
