"""Several engines behind one gateway: which one is asked, and what is left when one is away."""

import itertools
import shutil
from contextlib import ExitStack, contextmanager

import pytest

from fake_engine import ASK, BASE, NAMES, engine_of, gateway, numbered
from phatgoose.config import Serving
from serving import PATH, ask, beside, chunks_of, counts_of, error_of, health_of, text_of, until

E1 = {**ASK, "model": "e1"}


pytestmark = pytest.mark.usefixtures("embedder_for_all")


@contextmanager
def several(place, *engines, **options):
    """A client of a gateway to these engines, once they are there, and the engines."""
    with ExitStack() as stack:
        opened = [stack.enter_context(each) for each in engines]
        client = stack.enter_context(gateway(place, opened, **options))
        upstreams_are(client, *["ok"] * len(opened))
        yield client, *opened


def asked_of(engine):
    """The experts that were asked for, and the base."""
    return {each["model"] for each in engine.requests}


def upstreams_are(client, *states):
    until(lambda: health_of(client)["upstreams"] == list(states))


def test_an_expert_stays_with_its_engine_until_that_is_clearly_busier(place):
    with several(place, engine_of(), engine_of()) as (client, *both):
        for name in NAMES * 3:
            ask(client, **ASK | {"model": name})
        assert not asked_of(both[0]) & asked_of(both[1])
        one, other = both if "e1" in asked_of(both[0]) else both[::-1]
        other.requests.clear()
        with one.hanging("slow"):
            running = [beside(ask, client, **E1) for _ in range(5)]
            until(lambda: one.open == 5)
            for name in ("e1", BASE):  # which its second engine has, and the least busy one
                ask(client, **ASK | {"model": name})
            assert asked_of(other) == {"e1", BASE}
        assert all(each.result(30) for each in running)
        other.requests.clear()
        ask(client, **E1)
        assert not other.requests


def test_engines_of_two_forms_may_have_some_of_the_experts_each(place, caplog):
    kinds = {"llama.cpp": ("e0", "e1"), "vllm": ("e1", "e2", "e3")}
    some = [engine_of(kind, numbered(names), loads=False) for kind, names in kinds.items()]
    with several(place, *some) as (client, llama, _):
        assert caplog.text.count("can't be used for all experts: ") == 2
        assert text_of(client, **ASK | {"model": "e0"}).startswith("e0*1 ")
        assert text_of(client, **ASK | {"model": "e2"}).startswith("e2 ")
        assert text_of(client, **ASK, weights={"e0": 0.5, "e1": 0.5}).startswith("e0*0.5+e1*0.5 ")
        error = error_of(client, **ASK, weights={"e0": 0.5, "e2": 0.5})
        assert error["message"] == "No engine has all of these experts."
        chosen = client.post(PATH, json=ASK | {"router": "centroid", "k": 4})
        assert chosen.headers["x-phatgoose-experts"].endswith("=1")  # as no engine has all four
        up = 'phatgoose_upstream_up{upstream="%s"}'
        for state, status in (("away", 503), ("ok", 200)):  # nobody else has e0
            (llama.stop if state == "away" else llama.start)()
            llama.context = 256
            upstreams_are(client, state, "ok")
            assert client.get("/healthz").status_code == status
            assert client.post(PATH, json=ASK).status_code == status
            assert counts_of(client)[up % llama.url] == (state == "ok")
        assert client.get("/v1/models/goose").json()["context"] == 256


def test_adapters_are_numbered_anew_after_a_restart_that_nobody_saw(place):
    with several(place, engine_of("llama.cpp")) as (client, engine):
        assert text_of(client, **E1).startswith("e1*1 ")
        engine.adapters = numbered(NAMES[::-1])
        until(lambda: text_of(client, **E1).startswith("e1*1 "), seconds=5)
        upstreams_are(client, "ok")


def test_an_adapter_called_as_the_base_is_not_taken_for_it(place):
    with engine_of() as engine, gateway(place, engine) as client:
        upstreams_are(client, "ok")
        engine.adapters[BASE] = "/an/expert"
        text = text_of(client, **{**ASK, "model": BASE})
        until(lambda: text_of(client, **{**ASK, "model": BASE}) == text)
        assert BASE not in client.app.state.service.backend.links.engines[0].ids


def test_what_was_not_begun_goes_to_another_engine_and_nothing_else(place):
    with several(place, engine_of(), engine_of()) as (client, *both):
        ask(client, **E1)
        one, other = both if both[0].requests else both[::-1]
        for mode in ("busy", "loading"):
            one.mode = mode
            ask(client, **E1)
        other.mode = "busy"
        assert "can't take the request" in error_of(client, 429, **E1)["message"]
        other.mode, one.mode, before = "well", "broken", len(other.requests)
        *_, last = chunks_of(client, **E1)
        assert (last["error"]["code"], len(other.requests)) == ("upstream_broken", before)
        one.mode = "well"
        upstreams_are(client, "ok", "ok")
        del one.adapters["e1"]
        one.stop()
        assert [client.post(PATH, json=E1).status_code for _ in range(3)] == [200] * 3
        assert client.get("/healthz").status_code == 200
        one.start()
        upstreams_are(client, "ok", "ok")
        assert one.adapters["e1"] == str(place / "e1")  # loaded again
        before = len(one.requests)
        ask(client, **E1)
        assert len(one.requests) == before + 1


@pytest.mark.parametrize(
    ("mode", "stream"),
    [("unfinished", True), *itertools.product(("cut", "broken", "aborting", "slow"), (0, 1))],
)
def test_what_an_engine_breaks_off_before_its_client_has_anything_goes_to_another(
    place, mode, stream
):
    with several(place, *(engine_of() for _ in range(3))) as (client, *engines):
        ask(client, **E1)
        (one,) = (each for each in engines if each.requests)
        others = [each for each in engines if each is not one]
        one.mode, one.breaks = mode, 0
        one.requests.clear()
        running = beside(client.post, PATH, json={**E1, "stream": bool(stream)})
        if mode == "slow":  # and then it is killed
            until(lambda: one.open == 1)
            one.stop()
        reply = running.result(30)
        assert (reply.status_code, "error" in reply.text) == (200, False)
        assert reply.text.count('"text":"e1') == 1  # one answer
        assert sorted(len(each.requests) for each in others) == [0, 1]
        for each in others:  # each is asked once at most, and the last one's error is told
            each.mode, each.breaks = "cut", 0
            each.requests.clear()
        error = client.post(PATH, json={**E1, "stream": bool(stream)}).json()["error"]
        assert error["code"] == "upstream_broken"
        assert all(len(each.requests) == 1 for each in others)


def test_a_new_expert_is_served_by_the_engines_that_can_load_it(place, tmp_path, caplog):
    shutil.copytree(place / "e0", tmp_path / "e0")
    both = [engine_of("vllm", {}) for _ in range(2)]
    with several(tmp_path, *both, limits=Serving(watch=True)) as (client, one, other):
        one.loads = False
        shutil.copytree(place / "e1", tmp_path / "e1")
        until(lambda: client.get("/v1/models/goose").json()["experts"] == ["e0", "e1"])
        ask(client, **E1)
        assert asked_of(other) == {"e1"}
        other.loads = False
        shutil.copytree(place / "e2", tmp_path / "e2")
        until(lambda: "is served as it was: vLLM at" in caplog.text)
        ask(client, **E1)
