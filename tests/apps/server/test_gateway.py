"""The gateway: who is chosen, what the engine is asked for in its form, what comes back."""

import json
import logging
import shutil

import pytest

from fake_engine import BASE, PIECES, engine_of
from gateways import ASK, NAMES, chosen_by, gateway, numbered
from phatgoose.apps.server import Upstream
from phatgoose.errors import ConfigError, WrongBaseError
from phatgoose.experts.pool import Pool
from serving import CHAT_TEMPLATE, CHATS, PATH, ask, error_of
from topic_prompts import BEFORE, OWNERS, PROMPTS

KINDS = ("vllm", "sglang", "llama.cpp")
pytestmark = pytest.mark.usefixtures("embedder_for_all")
each_kind = pytest.mark.parametrize("kind", KINDS)


def text_of(reply):
    return reply["choices"][0]["text"]


@each_kind
def test_the_engine_answers_with_the_expert_that_is_chosen(place, kind):
    prompt = "Tell me of birds"
    wanted = max(chosen_by(place, prompt).items(), key=lambda pair: pair[1])[0]
    with engine_of(kind, numbered()) as engine, gateway(place, engine) as client:
        reply = client.post(PATH, json={**ASK, "prompt": prompt})
        assert reply.status_code == 200, reply.text
        assert text_of(reply.json()).split()[0].startswith(wanted)
        assert reply.headers["x-phatgoose-experts"] == f"{wanted}=1"
        assert "x-phatgoose-chosen" not in reply.headers
        assert text_of(ask(client, **{**ASK, "model": BASE})).split()[0] == BASE


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


def test_prompts_and_numbers_are_single_requests_of_the_engine(place):
    prompts = ["Tell me of birds", "zzz qqq"]
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        reply = client.post(PATH, json={**ASK, "prompt": prompts, "n": 2, "seed": 7})
    found = reply.json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    firsts = [choice["text"].split()[0] for choice in found["choices"]]
    assert firsts == [next(iter(chosen_by(place, p))) for p in prompts for _ in range(2)]
    assert sorted(each["seed"] for each in engine.requests) == [7, 8, 9, 10]
    assert "n" not in engine.requests[0]
    assert found["usage"]["completion_tokens"] == 4 * (PIECES + 1)
    shown = "; ".join(f"{next(iter(chosen_by(place, p)))}=1" for p in prompts)
    assert reply.headers["x-phatgoose-experts"] == shown


@each_kind
def test_a_mixture_goes_over_where_the_engine_mixes_and_else_its_first(place, kind):
    with engine_of(kind, numbered()) as engine, gateway(place, engine, router="centroid") as client:
        reply = client.post(PATH, json={**ASK, "routing": True})
        report = reply.json()["choices"][0]["routing"]
    chosen = chosen_by(place, ASK["prompt"], "centroid")
    assert len(chosen) == 3
    assert list(report["experts"]) == list(chosen)
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
        assert reply.headers["x-phatgoose-chosen"].startswith(f"{first}=")
    assert report["router"] == "centroid"


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
        assert error_of(client, **ASK, routing={"trace": True})["param"] == "routing"
        assert not engine.requests


def test_fields_of_a_message_that_only_the_engine_knows_come_along(place):
    with (
        engine_of("vllm", numbered()) as engine,
        gateway(place, engine, template=CHAT_TEMPLATE) as client,
    ):
        message = {"role": "assistant", "content": "a", "refusal": "no", "thought": "b"}
        engine.mode, engine.content = (
            "odd",
            json.dumps({"choices": [{"message": message}]}).encode(),
        )
        talk = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        reply = ask(client, path=CHATS, **talk)["choices"][0]["message"]
    assert reply == message


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_adapters_that_are_missing_are_loaded(place, kind):
    with engine_of(kind, numbered(("e0",))) as engine, gateway(place, engine) as client:
        assert [each["lora_name"] for each in engine.loaded] == ["e1", "e2", "e3"]
        assert engine.loaded[0]["lora_path"] == str((place / "e1").resolve())
        assert text_of(ask(client, **{**ASK, "model": "e3"})).startswith("e3")


def test_vllm_keeps_beginnings_apart_by_what_an_adapter_holds(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        ask(client, **{**ASK, "model": "e1"})
        ask(client, **{**ASK, "model": BASE})
    content = Pool.open(place)["e1"].info.adapter_sha256
    assert [each.get("cache_salt") for each in engine.requests] == [content, None]


@pytest.mark.parametrize(
    "listed", [[1], [{"id": 0}], *([{"id": i, "path": "/x/e0.gguf"}] for i in ("x", 1e999))]
)
def test_an_engine_that_lists_odd_adapters_is_an_error(place, listed):
    with engine_of("llama.cpp", numbered()) as engine:
        engine.listed = listed
        with pytest.raises(ConfigError, match="not the form of llama"), gateway(place, engine):
            pass


def test_the_engine_may_see_the_experts_elsewhere(place):
    elsewhere = {"experts_at": "/models/experts/"}
    with engine_of("vllm", {}) as engine, gateway(place, engine, upstream=elsewhere):
        assert engine.loaded[2]["lora_path"] == "/models/experts/e2"


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp"])
def test_adapters_that_can_not_be_loaded_are_named_in_one_error(place, kind):
    with (
        engine_of(kind, numbered(("e0", "e2")), loads=False) as engine,
        pytest.raises(ConfigError, match=r"lacks e1, e3.*[Ss]tart") as error,
        gateway(place, engine),
    ):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "router", "said"),
    [
        ("other", "retrieval", "--upstream-kind"),
        ("vllm", "phatgoose", "doesn't choose by a prompt alone"),
        (None, "retrieval", "is away"),
    ],
)
def test_what_can_not_be_a_gateway_is_an_error_at_start(place, kind, router, said):
    with engine_of(kind or "vllm", numbered()) as engine:
        if kind is None:
            engine.stop()
        with pytest.raises(ConfigError, match=said), gateway(place, engine, router=router):
            pass


def test_readings_come_from_the_base_which_is_loaded_for_them_alone(place, monkeypatch):
    from phatgoose.apps.server.upstream import choosing as module

    loaded, load = [], module.loaded_base
    monkeypatch.setattr(module, "loaded_base", lambda *a: loaded.append(a) or load(*a))
    with engine_of("vllm", numbered()) as engine:
        with gateway(place, engine):
            assert not loaded
        with gateway(place, engine, router="discriminant") as client:
            assert len(loaded) == 1
            assert text_of(ask(client, **ASK)).split()[0] in NAMES


def test_a_base_of_other_weights_reads_no_prompts_for_a_pool(place, tmp_path):
    shutil.copytree(place / "e1", tmp_path / "e1")
    config = tmp_path / "e1" / "phatgoose.json"
    known = Pool.open(place).base.fingerprint
    config.write_text(config.read_text().replace(known, f"sha256:{'0' * 64}"))
    with (
        engine_of("vllm", numbered()) as engine,
        pytest.raises(WrongBaseError),
        gateway(tmp_path, engine, router="discriminant"),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "must be the address"),
        ({"url": "http://me:secret@host"}, "must not hold a password"),
        ({"url": "me:secret@host"}, "must not hold a password"),
        ({"url": "http://[host"}, "must be the address"),
        ({"url": "http://host:port"}, "must be the address"),
        ({"url": "ftp://host"}, "must be the address"),
        ({"url": "http://host", "kind": "tgi"}, "vllm, sglang"),
        ({"url": "http://host", "key": "s\nt"}, "no header can carry"),
        ({"url": "http://host", "key": "secret "}, "no header can carry, or a space"),
    ],
)
def test_odd_addresses_are_refused_without_their_secrets(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Upstream(**options)
    assert "secret" not in str(error.value)


def test_the_engine_s_key_is_sent_and_never_shown(place, caplog):
    caplog.set_level(logging.DEBUG)
    key = "very-secret"
    with engine_of("vllm", numbered()) as engine:
        engine.key = key
        with (
            pytest.raises(ConfigError, match="refuses the key"),
            gateway(place, engine, upstream={"key": "wrong"}),
        ):
            pass
        with gateway(place, engine, upstream={"key": key}) as client:
            assert key not in repr(client.app.state.service.backend.engine.upstream)
            ask(client, **ASK)
            engine.key = "changed"
            assert error_of(client, 502, **ASK)["code"] == "upstream_key"
    assert key not in caplog.text
