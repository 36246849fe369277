"""An engine that is away, slow, restarted or killed: errors that say so, nobody else harmed."""

import json
import time

import httpx2
import pytest

import serving
from fake_engine import engine_of
from gateways import ASK, NAMES, gateway, numbered, running_gateway
from phatgoose.apps.server.upstream import engines
from phatgoose.config import Serving
from serving import PATH, ask, error_of

pytestmark = pytest.mark.usefixtures("embedder_for_all")
EXPERT = {**ASK, "model": "e1"}


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(engines, "CHECKING", 0.05)


def status_is(client, status):
    serving.until(lambda: client.get("/healthz").status_code == status)


def streamed(client, **body):
    """The status of a stream and its events, the last one an error perhaps."""
    with client.stream("POST", PATH, json={**EXPERT, **body, "stream": True}) as reply:
        if reply.status_code != 200:
            return reply.status_code, [json.loads(reply.read())]
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    return 200, [json.loads(line) if line != "[DONE]" else line for line in lines]


def test_an_engine_that_is_away_is_a_503_and_gets_its_adapters_when_it_is_back(place):
    with engine_of("vllm", {}) as engine, gateway(place, engine) as client:
        assert len(engine.loaded) == 4
        engine.stop()
        engine.adapters.clear()
        for stream in (False, True):
            reply = client.post(PATH, json={**EXPERT, "stream": stream})
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert reply.json()["error"]["code"] == "upstream_unavailable"
        status_is(client, 503)
        engine.start()
        status_is(client, 200)
        assert len(engine.loaded) == 8
        assert ask(client, **EXPERT)["choices"][0]["text"].startswith("e1")
        del engine.adapters["e1"]  # which it has lost otherwise
        assert error_of(client, 503, **EXPERT)["message"].startswith("The engine doesn't know")
        serving.until(lambda: "e1" in engine.adapters)
        ask(client, **EXPERT)


def test_adapters_that_have_other_numbers_after_a_restart_are_found(place):
    with engine_of("llama.cpp", numbered()) as engine, gateway(place, engine) as client:
        engine.stop()
        engine.adapters = numbered(NAMES[::-1])
        status_is(client, 503)
        engine.start()
        status_is(client, 200)
        assert ask(client, **EXPERT)["choices"][0]["text"].startswith("e1*1 ")


@pytest.mark.parametrize("mode", ["broken", "unfinished"])
def test_a_stream_that_breaks_off_ends_with_an_error(place, mode):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = mode
        status, found = streamed(client)
        assert (status, len(found)) == (200, 3 + 1)
        assert found[-1]["error"]["code"] == "upstream_broken"
        assert len(engine.requests) == 1  # not sent again
        engine.mode = "well"
        assert streamed(client)[1][-1] == "[DONE]"


def test_an_engine_that_is_killed_amid_streams_ends_them_all(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = "stalled"
        running = [serving.in_a_thread(streamed, client) for _ in range(5)]
        serving.until(lambda: engine.open == 5)
        time.sleep(0.1)
        engine.stop()
        for thread, found in running:
            thread.join(10)
            assert found[0][1][-1]["error"]["code"] == "upstream_broken"


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


def test_an_answer_of_another_form_is_a_502(place):
    with engine_of("llama.cpp", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = "odd"
        for content in (
            b"[" * 100_000,
            b'{"choices": [{"text": "\\ud800"}]}',
            b'{"choices": [{"text": "a", "score": NaN}]}',
            b'{"choices": [{"text": "a", "logprobs": {"content": [{"token": "a"}]}}]}',
            b'{"choices": [{"text": ["a"]}]}',
            b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": 1%s}}' % (b"0" * 400),
            b"\xff",
            b'{"choices": []}',
        ):
            engine.content = content
            assert error_of(client, 502, **EXPERT)["code"] == "upstream_broken"
            if content not in (b"\xff", b'{"choices": []}'):  # which a stream may hold
                assert streamed(client)[1][-1]["error"]["code"] == "upstream_broken"


def test_an_answer_may_be_as_long_as_what_was_asked_for(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        engine.mode = "odd"
        for length, status in ((900_000, 200), (1_200_000, 502)):
            engine.content = json.dumps({"choices": [{"text": "x" * length}]}).encode()
            reply = client.post(PATH, json=EXPERT)
            assert reply.status_code == status
        assert "The engine answers more than" in reply.json()["error"]["message"]
        assert "The engine answers more than" in streamed(client)[1][-1]["error"]["message"]
        engine.mode = "endless"  # a stream that nobody asked for
        assert error_of(client, 502, **EXPERT)["code"] == "upstream_failed"


def test_an_endless_stream_waits_for_who_reads_it_and_ends_with_its_time(place):
    with (
        engine_of("vllm", numbered()) as engine,
        running_gateway(place, engine, Serving(timeout=3)) as url,
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
            for line in filter(None, lines):
                if '"timeout"' in line:
                    break
            else:
                pytest.fail("It didn't end.")
        serving.until(lambda: engine.open == 0)


def test_a_slow_engine_is_given_up_at_the_deadline(place):
    limits = Serving(timeout=1)
    with engine_of("vllm", numbered()) as engine, gateway(place, engine, limits) as client:
        engine.mode = "slow"
        for stream in (False, True):
            assert client.post(PATH, json={**EXPERT, "stream": stream}).status_code == 504
        engine.mode = "stalled"
        status, found = streamed(client)
        assert (status, found[-1]["error"]["code"]) == (200, "timeout")
        engine.go_on.set()
        serving.until(lambda: client.get("/healthz").json()["running"] == 0)


def test_more_answers_than_the_queue_holds_are_refused(place):
    limits = Serving(max_queue=4)
    with engine_of("vllm", numbered()) as engine, gateway(place, engine, limits) as client:
        engine.mode = "slow"
        running = [serving.in_a_thread(client.post, PATH, json=EXPERT) for _ in range(2)]
        serving.until(lambda: engine.open == 2)
        assert error_of(client, 429, **EXPERT)["code"] == "overloaded"  # half of it is a client's
        engine.mode = "well"
        engine.go_on.set()
        for thread, found in running:
            thread.join(30)
            assert found[0].status_code == 200
        assert error_of(client, 429, **{**EXPERT, "n": 3})["code"] == "overloaded"


def test_a_client_that_goes_away_frees_its_place(place):
    with engine_of("vllm", numbered()) as engine, running_gateway(place, engine) as url:

        def running():
            return httpx2.get(f"{url}/healthz").json()["running"]

        engine.mode = "stalled"
        with httpx2.stream("POST", url + PATH, json={**EXPERT, "stream": True}) as reply:
            lines = reply.iter_lines()  # held: a generator that is dropped closes its connection
            next(lines)
            assert running() == 1
        serving.until(lambda: running() == 0)
        engine.mode = "slow"
        for stream in (False, True):
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(url + PATH, json={**EXPERT, "stream": stream}, timeout=0.3)
            serving.until(lambda: running() == 0)
