"""The gateway: who is chosen, what the engine is asked for in its form, what comes back."""

import json
import logging
import shutil

import pytest

from fake_engine import BASE, PIECES, engine_of
from gateways import ASK, chosen_by, gateway, numbered
from phatgoose.apps.server import Upstream
from phatgoose.errors import ConfigError, WrongBaseError
from phatgoose.experts.pool import Pool
from serving import CHAT_TEMPLATE, CHATS, PATH, ask, error_of, until
from topic_prompts import BEFORE, OWNERS, PROMPTS

pytestmark = pytest.mark.usefixtures("embedder_for_all")
each_kind = pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])


def text_of(reply):
    return reply["choices"][0]["text"]


def test_prompts_and_numbers_are_single_requests_of_the_expert_that_is_chosen(place):
    prompts = ["Tell me of birds", "zzz qqq"]
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        reply = client.post(PATH, json={**ASK, "prompt": prompts, "n": 2, "seed": 7})
        assert text_of(ask(client, **{**ASK, "model": BASE})).split()[0] == BASE
    choices, usage = reply.json()["choices"], reply.json()["usage"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    firsts = [choice["text"].split()[0] for choice in choices]
    assert firsts == [next(iter(chosen_by(place, p))) for p in prompts for _ in range(2)]
    assert sorted(each["seed"] for each in engine.requests[:4]) == [7, 8, 9, 10]
    assert "n" not in engine.requests[0]
    assert usage["completion_tokens"] == 4 * (PIECES + 1)
    shown = "; ".join(f"{next(iter(chosen_by(place, p)))}=1" for p in prompts)
    assert reply.headers["x-phatgoose-experts"] == shown


def test_a_chat_goes_to_the_expert_of_its_last_user_message(place):
    before = next(iter(BEFORE.values()))
    with (
        engine_of("vllm", numbered()) as engine,
        gateway(place, engine, template=CHAT_TEMPLATE) as client,
    ):
        for prompt, owner in zip(PROMPTS, OWNERS, strict=True):
            turns = [*before, ("user", prompt)]
            messages = [{"role": role, "content": content} for role, content in turns]
            reply = client.post(CHATS, json={"model": "auto", "messages": messages})
            assert reply.headers["x-phatgoose-experts"] == f"{owner}=1"
        # Fields of a message that only the engine knows come along.
        message = {"role": "assistant", "content": "a", "refusal": "no", "thought": "b"}
        engine.mode = "odd"
        engine.content = json.dumps({"choices": [{"message": message}]}).encode()
        reply = ask(client, path=CHATS, model="auto", messages=messages)
        assert reply["choices"][0]["message"] == message


@each_kind
def test_a_mixture_goes_over_where_the_engine_mixes_and_else_its_first(place, kind):
    with engine_of(kind, numbered()) as engine, gateway(place, engine, router="centroid") as client:
        reply = client.post(PATH, json={**ASK, "routing": True})
        report = reply.json()["choices"][0]["routing"]
    chosen = chosen_by(place, ASK["prompt"], "centroid")
    assert len(chosen) == 3
    assert (report["router"], list(report["experts"])) == ("centroid", list(chosen))
    if kind == "llama.cpp":
        scales = {each["id"]: each["scale"] for each in engine.requests[0]["lora"]}
        wanted = {int(numbered()[name]): pytest.approx(w) for name, w in chosen.items()}
        assert {number: scale for number, scale in scales.items() if scale} == wanted
        assert report["summary"] == {n: pytest.approx(w, abs=1e-4) for n, w in chosen.items()}
        assert report["chosen"] is None
    else:
        first = next(iter(chosen))
        assert report["summary"] == {first: 1.0}
        assert list(report["chosen"]) == list(chosen)
        assert reply.headers["x-phatgoose-experts"] == f"{first}=1"


def test_sampling_is_what_the_request_says_and_nothing_else(place):
    for kind, plain in (("vllm", {"top_k": -1, "min_p": 0.0}), ("llama.cpp", {"top_k": 0})):
        with engine_of(kind, numbered()) as engine, gateway(place, engine) as client:
            ask(client, model="e0", prompt="a", top_p=0.5, stop=["x"], ignore_eos=True)
        asked = engine.requests[0]
        wanted = {"temperature": 1, "top_p": 0.5, "stop": ["x"], "ignore_eos": True, **plain}
        assert {key: asked[key] for key in wanted} == wanted
        assert (asked["max_tokens"], asked["prompt"]) == (16, "a")


def test_what_no_engine_does_is_refused_here(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        assert error_of(client, **ASK, routing="trace")["param"] == "routing"
        assert not engine.requests


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("vllm", {}, "vLLM at .* lacks e1, e3 (Not Found). Start it as"),
        ("llama.cpp", {}, "lacks e1, e3 (it reads adapters when"),
        ("other", {}, "is neither vLLM nor llama.cpp"),
        ("vllm", {"key": "secret"}, "refuses the key; set PHATGOOSE_UPSTREAM_KEY"),
        *(
            ("llama.cpp", {"listed": listed}, "/lora-adapters (status 200) has another form: 0:")
            for listed in ([1], [{"id": 0}], *([{"id": i, "path": "/x"}] for i in ("x", 1e999)))
        ),
    ],
    ids=str,
)
def test_an_engine_that_can_not_be_used_is_a_503_and_a_line_of_the_log(
    place, caplog, kind, change, said
):
    with engine_of(kind, numbered(("e0", "e2")), loads=False) as engine:
        vars(engine).update(change)
        with gateway(place, engine, key="wrong", ready=False) as client:
            until(lambda: "can't be used" in caplog.text)
            assert error_of(client, 503, **ASK)["code"] == "upstream_unavailable"
            assert client.get("/healthz").json()["upstream"] == "away"
    (line,) = [each.getMessage() for each in caplog.records if "be used" in each.getMessage()]
    for part in said.split(".*"):
        assert part in line
    assert "\n" not in line


def test_readings_come_from_the_base_of_the_pool_s_own_weights(place, tmp_path):
    shutil.copytree(place / "e1", tmp_path / "e1")
    config = tmp_path / "e1" / "phatgoose.json"
    fingerprint = Pool.open(place).base.fingerprint
    config.write_text(config.read_text().replace(fingerprint, f"sha256:{'0' * 64}"))
    with engine_of("vllm", numbered()) as engine:
        with (
            pytest.raises(ConfigError, match="doesn't choose by a prompt alone"),
            gateway(place, engine, router="phatgoose"),
        ):
            pass
        with gateway(place, engine, router="discriminant") as client:
            chosen = chosen_by(place, ASK["prompt"], "discriminant", with_base=True)
            assert text_of(ask(client, **ASK)).split()[0] == next(iter(chosen))
        with pytest.raises(WrongBaseError), gateway(tmp_path, engine, router="discriminant"):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"url": url}, "must be the address .* without a password")
            for url in (
                *("localhost:8000", "http://me:secret@host", "me:secret@host", "http://[host"),
                *("http://host:port", "ftp://host"),
            )
        ),
        *(({"url": "http://host", "key": key}, "visible") for key in ("s\nt", "secret ", "é")),
    ],
)
def test_odd_addresses_are_refused_without_their_secrets(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Upstream(**options)
    assert "secret" not in str(error.value)


def test_the_engine_s_key_is_sent_and_never_shown(place, caplog):
    caplog.set_level(logging.DEBUG)
    key = 'very-"secret'
    with engine_of("vllm", numbered()) as engine:
        engine.key = key
        with gateway(place, engine, key=key) as client:
            assert "secret" not in repr(client.app.state.service.backend.link.upstream)
            ask(client, **ASK)
            for stream in (False, True):
                engine.mode = "repeating"  # what it was sent, the key among it
                reply = client.post(PATH, json={**ASK, "stream": stream})
                assert "Bearer …" in reply.json()["error"]["message"]
                engine.mode = "odd"
                engine.content = json.dumps({"error": {"headers": key}}).encode()
                reply = client.post(PATH, json={**ASK, "stream": stream})
                assert "The engine failed" in reply.text
                assert "secret" not in reply.text
            engine.key = "changed"
            assert error_of(client, 502, **ASK)["message"] == "The engine failed by 401: wrong key."
    assert "secret" not in caplog.text
