"""An engine that is away, slow, restarted or killed: errors that say so, nobody else harmed."""

import json
import threading
import time

import httpx2
import pytest

import serving
from fake_engine import PIECES, engine_of
from gateways import ASK, NAMES, gateway, numbered
from phatgoose.apps.server.service import Turns
from phatgoose.apps.server.upstream import link as forwarding
from phatgoose.config import Serving
from serving import PATH, ask, error_of, events

pytestmark = pytest.mark.usefixtures("embedder_for_all")
EXPERT = {**ASK, "model": "e1"}


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(forwarding, "CHECKING", 0.05)
    monkeypatch.setattr(forwarding, "RETRYING", 0.3)


def streamed(client, **body):
    """The events of a stream, the last one an error perhaps, and the status."""
    with client.stream("POST", PATH, json={**EXPERT, **body, "stream": True}) as reply:
        if reply.status_code != 200:
            return reply.status_code, [json.loads(reply.read())]
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    return 200, [json.loads(line) if line != "[DONE]" else line for line in lines]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_away_is_a_503_and_comes_back(place, stream):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.stop()
        reply = client.post(PATH, json={**EXPERT, "stream": stream})
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "upstream_unavailable"
        serving.until(lambda: client.get("/healthz").status_code == 503)
        assert client.get("/healthz").json()["upstream"] == "away"
        engine.start()
        serving.until(lambda: client.get("/healthz").status_code == 200)
        assert ask(client, **EXPERT)["choices"][0]["text"].startswith("e1")


def test_an_engine_that_was_restarted_gets_its_adapters_again(place):
    with engine_of("vllm", {}) as engine, gateway(place, engine) as client:
        assert len(engine.loaded) == 4
        engine.stop()
        engine.adapters.clear()
        serving.until(lambda: client.get("/healthz").status_code == 503)
        engine.start()
        serving.until(lambda: client.get("/healthz").status_code == 200)
        assert len(engine.loaded) == 8
        ask(client, **EXPERT)


def test_an_expert_that_a_failed_change_has_lost_is_loaded_with_the_next_request(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        here = client.app.state.service.backend.engine
        del engine.adapters["e1"]
        here.adapters = here.adapters._replace(ids={"e0": "e0"})
        assert ask(client, **EXPERT)["choices"][0]["text"].startswith("e1")
        assert [each["lora_name"] for each in engine.loaded] == ["e1"]


def test_adapters_that_have_other_numbers_after_a_restart_are_found(place):
    with engine_of("llama.cpp", numbered()) as engine, gateway(place, engine) as client:
        engine.stop()
        engine.adapters = numbered(NAMES[::-1])
        serving.until(lambda: client.get("/healthz").status_code == 503)
        engine.start()
        assert ask(client, **EXPERT)["choices"][0]["text"].startswith("e1*1 ")


@pytest.mark.parametrize(("mode", "said"), [("broken", 3), ("unfinished", 3)])
def test_a_stream_that_breaks_off_ends_with_an_error(place, mode, said):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = mode
        status, found = streamed(client)
        assert status == 200
        assert len(found) == said + 1
        assert found[-1]["error"]["code"] == "upstream_broken"
        assert len(engine.requests) == 1  # not sent again
        engine.mode = "well"
        assert streamed(client)[1][-1] == "[DONE]"
        told = client.get("/metrics").text
        assert 'phatgoose_upstream_failures_total{how="broken"} 1.0' in told


def test_an_engine_that_is_killed_amid_streams_ends_them_all(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = "stalled"
        running = [serving.in_a_thread(streamed, client) for _ in range(5)]
        serving.until(lambda: engine.open == 5)
        time.sleep(0.1)
        engine.stop()
        engine.mode = "well"
        for thread, found in running:
            thread.join(10)
            assert found[0][1][-1]["error"]["code"] == "upstream_broken"
        engine.go_on.set()
        engine.start()
        serving.until(lambda: client.get("/healthz").status_code == 200)
        assert streamed(client)[1][-1] == "[DONE]"


@pytest.mark.parametrize(
    ("mode", "status", "code"),
    [
        ("refusing", 400, "upstream_refused"),
        ("busy", 429, "upstream_unavailable"),
        ("loading", 503, "upstream_unavailable"),
        ("failing", 502, "upstream_failed"),
        ("cut", 502, "upstream_broken"),
        ("broken", 502, "upstream_broken"),
        ("odd", 502, "upstream_broken"),
        ("aborting", 502, "upstream_broken"),
    ],
)
def test_an_error_of_the_engine_is_passed_on_and_nothing_sent_twice(place, mode, status, code):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = mode
        error = error_of(client, status, **EXPERT)
        assert error["code"] == code
        assert "/secret" not in error["message"]
        assert "\n" not in error["message"]
        assert len(engine.requests) == 1
        if mode in ("refusing", "busy", "failing"):
            assert streamed(client)[0] == status


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"choices": [{"text": "\\ud800"}]}',
        b'{"choices": [{"text": "a", "logprobs": {"content": [{"token": "a", "logprob": NaN}]}}]}',
        b'{"choices": [{"text": "a", "logprobs": {"tokens": [1], "token_logprobs": [-1]}}]}',
        b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": 1%s}}' % (b"0" * 400),
        b'{"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": []}}]}',
        b"\xff",
        b'{"choices": []}',
    ],
    ids=lambda content: content[:60].decode(errors="replace"),
)
def test_an_answer_of_another_form_is_a_502(place, content):
    with engine_of("llama.cpp", numbered()) as engine, gateway(place, engine) as client:
        engine.mode, engine.content = "odd", content
        assert error_of(client, 502, **EXPERT, logprobs=1)["code"] == "upstream_broken"
        if content not in (b"\xff", b'{"choices": []}'):  # which a stream may hold
            assert streamed(client, logprobs=1)[1][-1]["error"]["code"] == "upstream_broken"


def test_an_answer_may_be_as_long_as_what_was_asked_for(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = "odd"
        for length, status in ((900_000, 200), (1_200_000, 502)):
            engine.content = json.dumps({"choices": [{"text": "x" * length}]}).encode()
            reply = client.post(PATH, json=EXPERT)
            assert reply.status_code == status
        assert "The engine answers more than" in reply.json()["error"]["message"]
        assert "The engine answers more than" in streamed(client)[1][-1]["error"]["message"]


def test_a_stream_that_nobody_asked_for_is_held_to_the_length_of_an_answer(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = "endless"
        assert error_of(client, 502, **EXPERT)["code"] == "upstream_failed"
        engine.mode = "well"


def test_an_endless_stream_waits_for_who_reads_it(place):
    with (
        engine_of("vllm", numbered()) as engine,
        gateway(place, engine) as client,
        serving.running(client.app) as url,
    ):
        engine.mode = "endless"
        with httpx2.stream("POST", url + PATH, json={**EXPERT, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            before = -1
            while before < engine.sent < 1000:  # of 64 KiB each
                before = engine.sent
                time.sleep(0.5)
            assert engine.sent < 1000
        serving.until(lambda: engine.open == 0)


def test_a_client_that_reads_slowly_gets_no_more_than_its_time(place):
    with (
        engine_of("vllm", numbered()) as engine,
        gateway(place, engine, Serving(timeout=1)) as client,
        serving.running(client.app) as url,
    ):
        engine.mode = "endless"
        with httpx2.stream("POST", url + PATH, json={**EXPERT, "stream": True}) as reply:
            for number, line in enumerate(filter(None, reply.iter_lines())):
                time.sleep(0.01)
                if number > 800 or '"timeout"' in line:
                    break
        assert json.loads(line.removeprefix("data: "))["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_repeats_its_key_shows_it_to_nobody(place, stream):
    key = 'very-"secret'
    upstream = {"key": key}
    with (
        engine_of("vllm", numbered()) as engine,
        gateway(place, engine, upstream=upstream) as client,
    ):
        engine.mode = "repeating"
        reply = client.post(PATH, json={**EXPERT, "stream": stream})
        assert "Bearer …" in reply.json()["error"]["message"]
        engine.mode, engine.content = "odd", json.dumps({"error": {"headers": key}}).encode()
        reply = client.post(PATH, json={**EXPERT, "stream": stream})
        assert "The engine failed" in reply.text
        assert "secret" not in reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_engine_is_given_up_at_the_deadline(place, stream):
    limits = Serving(timeout=1)
    with engine_of("vllm", numbered()) as engine, gateway(place, engine, limits) as client:
        engine.mode = "slow"
        reply = client.post(PATH, json={**EXPERT, "stream": stream})
        assert reply.status_code == 504
        engine.mode = "stalled"
        status, found = streamed(client)
        assert (status, found[-1]["error"]["code"]) == (200, "timeout")
        engine.go_on.set()
        serving.until(lambda: client.get("/healthz").json()["running"] == 0)


def test_answers_wait_for_their_turn_and_others_are_refused(place):
    limits = Serving(max_queue=4)
    with engine_of("vllm", numbered()) as engine, gateway(place, engine, limits) as client:
        client.app.state.service.backend.turns = Turns(2)
        engine.mode = "slow"
        running = []
        for count in (1, 2, 3, 4):
            running.append(serving.in_a_thread(client.post, PATH, json=EXPERT))
            serving.until(lambda c=count: _held(client) == c)
        assert engine.open == 2
        assert error_of(client, 429, **EXPERT)["code"] == "overloaded"
        engine.mode = "well"
        engine.go_on.set()
        for thread, found in running:
            thread.join(30)
            assert found[0].status_code == 200


def _held(client):
    health = client.get("/healthz").json()
    return health["running"] + health["waiting"]


def test_a_client_that_goes_away_frees_its_place(place):
    with (
        engine_of("vllm", numbered()) as engine,
        gateway(place, engine) as client,
        serving.running(client.app) as url,
    ):
        engine.mode = "stalled"
        with httpx2.stream("POST", url + PATH, json={**EXPERT, "stream": True}) as reply:
            lines = reply.iter_lines()  # held: a generator that is dropped closes its connection
            next(lines)
            assert client.app.state.service.backend.turns.free == 255
        serving.until(lambda: client.app.state.service.backend.turns.free == 256)
        engine.mode = "slow"
        for stream in (False, True):
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(url + PATH, json={**EXPERT, "stream": stream}, timeout=0.3)
            serving.until(lambda: client.app.state.service.backend.turns.free == 256)


def test_many_clients_get_their_own_answers(place):
    with engine_of("llama.cpp", numbered()) as engine, gateway(place, engine) as client:
        found = {}

        def one(number):
            name = NAMES[number % 4]
            chunks = events(client, **{**EXPERT, "model": name})
            found[number] = "".join(c["choices"][0]["text"] for c in chunks)

        threads = [threading.Thread(target=one, args=[number]) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    texts = " ".join(map(str, range(PIECES)))
    assert found == {number: f"{NAMES[number % 4]}*1 {texts}" for number in range(64)}
