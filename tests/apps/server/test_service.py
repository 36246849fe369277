"""What is served, and what the routes call: routings composed beside others, in turns, in time."""

import asyncio
import threading
from unittest.mock import MagicMock

import pytest

from architectures import make_tiny
from fake_engine import NAMES
from phatgoose.apps.server import ServedModel, create_app, keys_of, served_models
from phatgoose.apps.server.protocol import RoutingOverride
from phatgoose.apps.server.replies import Progress, Reply
from phatgoose.apps.server.turns import Deadline, Turns, in_thread
from phatgoose.config import Routing
from phatgoose.errors import BaseModelError, ConfigError, PhatgooseError
from phatgoose.routing.compose import compose, save
from serving import (
    CHAT_TEMPLATE,
    GREEDY,
    PATH,
    ask,
    beside,
    client_of,
    error_of,
    folder_of,
    until,
)
from tiny import make_tokenizer
from topic_prompts import PROMPTS


def test_others_are_served_while_a_routing_is_composed(guarded):
    routings, go_on = guarded.app.state.service.routings, threading.Event()

    async def compose_another():
        return await routings.turns.run("third", Deadline(60), lambda _: go_on.wait(30))

    def status(key, **change):
        headers = {"Authorization": f"Bearer {key}"}
        return guarded.post(PATH, json={**GREEDY, **change}, headers=headers).status_code

    composing = guarded.portal.start_task_soon(compose_another)
    until(lambda: not routings.turns.free)
    begun = [beside(status, "secret", k=k) for k in (1, 1, 3)]
    until(lambda: len(routings.turns) == 3)
    assert (status("other"), status("secret")) == (200, 200)
    go_on.set()
    assert composing.result()
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


def test_routings_that_are_asked_for_at_once_are_no_more_than_fit(client):
    service, held = client.app.state.service, []

    async def hold(k):
        change = RoutingOverride(k=k)
        cached = await service.routings.acquire(service.models["goose"], change, "b", Deadline(60))
        held.append(cached.__enter__())

    async def all_at_once():
        return await asyncio.gather(*map(hold, (1, 3, 4)), return_exceptions=True)

    refused = [each for each in client.portal.call(all_at_once) if each is not None]
    assert (len(held), [each.status_code for each in refused]) == (2, [429])


def test_what_work_raises_arrives_and_the_next_is_done():
    def work(_):
        raise BaseException("no")  # as errors of compiled Rust are

    async def done():
        readers = Turns(1)
        with pytest.raises(RuntimeError, match="no"):
            await readers.run("a", Deadline(30), work)
        return await readers.run("a", Deadline(30), lambda _: 5)

    assert asyncio.run(done()) == 5


def test_no_client_waits_for_turns_without_end():
    async def tried(waiting):
        turns = Turns(0, waiting)
        mine = [asyncio.create_task(turns.wait("a", Deadline(30))) for _ in range(waiting)]
        await asyncio.sleep(0)
        over = [each.exception() for each in mine if each.done()]
        for each in mine:
            each.cancel()
        await asyncio.wait(mine)
        return len(over), {each.status_code for each in over}

    assert asyncio.run(tried(400)) == (200, {429})


def test_work_that_nobody_waits_for_any_more_ends_in_silence():
    said, go_on = [], threading.Event()

    async def given_up():
        asyncio.get_running_loop().set_exception_handler(lambda _, what: said.append(what))
        result = in_thread(go_on.wait)
        result.cancel()
        go_on.set()
        assert await in_thread(lambda: 5) == 5
        await asyncio.sleep(0.05)

    asyncio.run(given_up())
    assert said == []


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


@pytest.fixture(scope="module")
def limited(client_with):
    """`limited(key)`: a client with that key; "some" may use e1 and e3."""
    client = client_with(api_keys=["all", "some=e1+e3", "padded==", "long===e2"])
    client.app.state.service.models["goose"].runner.tokenizer.chat_template = CHAT_TEMPLATE

    def with_key(key):
        client.headers["Authorization"] = f"Bearer {key}"
        return client

    yield with_key
    del client.headers["Authorization"]


@pytest.mark.parametrize(
    ("key", "experts"),
    [("all", NAMES), ("some", ("e1", "e3")), ("padded==", NAMES), ("long==", ("e2",))],
)
def test_a_key_is_told_of_its_experts_alone(limited, key, experts):
    cards = limited(key).get("/v1/models").json()["data"]
    assert [(each["id"], each["experts"]) for each in cards] == [
        (name, list(experts)) for name in ("goose", "mean")
    ]
    for name in NAMES:
        reply = limited(key).get(f"/v1/models/goose:{name}")
        assert reply.status_code == (200 if name in experts else 404)
    ask(limited("all"), **GREEDY | {"model": "goose:e0"})  # which metrics name
    assert limited(key).get("/metrics").status_code == (200 if experts == NAMES else 403)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: {"model": f"goose:{name}"},
        lambda name: {"model": name},
        lambda name: {"weights": {name: 1.0, "e1": 0.5}},
        lambda name: {"keep": ["e1", name]},
        lambda name: {"leave_out": [name]},
        lambda name: {"router": f"single:expert={name}"},
    ],
)
def test_an_expert_of_others_is_refused_as_an_unknown_one_is(limited, change):
    others, unknown = (
        limited("some").post(PATH, json=GREEDY | change(name)) for name in ("e0", "e9")
    )
    assert others.status_code == unknown.status_code >= 400
    assert others.text.replace("e0", "e9") == unknown.text
    assert "e2" not in others.text
    assert ask(limited("some"), **GREEDY | change("e3"))


@pytest.mark.parametrize("change", [{}, {"model": "mean"}, {"k": 1}, {"router": "arrow"}], ids=str)
def test_what_is_chosen_for_a_key_is_among_its_experts(limited, change):
    body = {**GREEDY, **change, "routing": True}
    limited_to, kept = ask(limited("some"), **body), ask(limited("all"), **body, keep=["e1", "e3"])
    assert limited_to["choices"] == kept["choices"]
    assert set(limited_to["choices"][0]["routing"]["summary"]) <= {"e1", "e3"}
    mixed = ask(limited("some"), **GREEDY, weights={"e3": 1.0}, routing="trace")
    assert "e0" not in str(mixed["choices"][0]["routing"])


@pytest.mark.parametrize("router", ["retrieval", "centroid", "discriminant:fallback=off", "saved"])
def test_a_router_by_prompt_chooses_among_the_experts_of_a_key(
    place, pool, router, embedder_for_all, tmp_path
):
    """Without a composition of their own, so that many keys may have different ones."""
    if router == "saved":
        save(compose(pool, router="discriminant:fallback=off"), tmp_path / "routed")
        model = ServedModel("goose", str(tmp_path / "routed"), dtype="float32")
    else:
        model = ServedModel("goose", str(place), Routing(router, k=2), dtype="float32")
    app = create_app([model], api_keys=["all", "some=e1+e3"])
    with client_of(app) as client:
        for prompt in (*PROMPTS, "Expert e0, keep e0!"):
            body = {**GREEDY, "prompt": prompt, "routing": "trace"}
            reply = client.post(PATH, json=body, headers={"Authorization": "Bearer some"})
            report = reply.json()["choices"][0]["routing"]
            chosen = [set(token["experts"]) for token in report["tokens"] if token["experts"]]
            assert set.union(*chosen) == set(report["summary"]) <= {"e1", "e3"}
            assert report["experts"] == ["e1", "e3"]
            assert not {"e0", "e2"} & {*report["trace"]["experts"]}
            named = reply.headers["x-phatgoose-experts"]
            assert {each.partition("=")[0] for each in named.split(", ")} <= {"e1", "e3"}
        assert not app.state.service.routings.cached


def test_keys_of_what_is_not_served_are_refused(pool, tmp_path):
    place = str(folder_of(pool))
    with pytest.raises(ConfigError, match=r"names an expert that isn't served; there are e0, e1"):
        create_app([ServedModel("b", place, dtype="float32")], api_keys=["secret=e1+e7"])
    save(compose(pool, router="phatgoose"), tmp_path / "routed")
    with pytest.raises(PhatgooseError, match="isn't a pool"):
        create_app([ServedModel("b", str(tmp_path / "routed"))], api_keys=["secret=e1"])


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "openai-gpt", "t5"])
def test_bases_that_keep_something_else_than_keys_and_values_are_refused(kind, tmp_path):
    make_tiny(kind).save_pretrained(tmp_path)
    make_tokenizer(final_eos=False).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="the server can't batch such a model"):
        create_app([ServedModel("odd", str(tmp_path))])


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
