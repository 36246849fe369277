"""The gateway: who is chosen, what the engine is asked for in its form, what comes back."""

import logging
import shutil

import pytest

from fake_engine import BASE, PIECES, engine_of
from gateways import ASK, NAMES, chosen_by, gateway, numbered
from phatgoose.apps.server import Upstream
from phatgoose.config import Routing, Serving
from phatgoose.errors import ConfigError, WrongBaseError
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.auto import BY_PROMPT, first_allowed
from serving import CHAT_TEMPLATE, CHATS, PATH, ask, error_of, events
from topic_prompts import BEFORE, OWNERS, PROMPTS

KINDS = ("vllm", "sglang", "llama.cpp")
pytestmark = pytest.mark.usefixtures("embedder_for_all")
each_kind = pytest.mark.parametrize("kind", KINDS)


def text_of(reply):
    return reply["choices"][0]["text"]


@each_kind
@pytest.mark.parametrize("prompt", ["Tell me of birds", "to be or not", "zzz qqq"])
def test_the_engine_answers_with_the_expert_that_is_chosen(place, kind, prompt):
    wanted = max(chosen_by(place, prompt).items(), key=lambda pair: pair[1])[0]
    with engine_of(kind, numbered()) as engine, gateway(place, engine) as client:
        reply = client.post(PATH, json={**ASK, "prompt": prompt})
        assert reply.status_code == 200, reply.text
        assert text_of(reply.json()).split()[0].startswith(wanted)
        assert reply.headers["x-phatgoose-experts"] == f"{wanted}=1"
        assert "x-phatgoose-chosen" not in reply.headers
        assert reply.json()["model"] == "auto"


@each_kind
def test_a_stream_comes_piece_by_piece(place, kind):
    with engine_of(kind, numbered()) as engine, gateway(place, engine) as client:
        body = {**ASK, "model": "e2", "stream_options": {"include_usage": True}}
        chunks = events(client, **body)
        texts = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
        assert "".join(texts).split() == [text_with("e2", kind), *map(str, range(PIECES))]
        assert len(texts) >= PIECES
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert chunks[-1]["usage"]["completion_tokens"] == PIECES + 1
        assert len({chunk["id"] for chunk in chunks}) == 1


def text_with(name, kind):
    return f"{name}*1" if kind == "llama.cpp" else name


@each_kind
@pytest.mark.parametrize("stream", [False, True])
def test_chats_are_passed_on_as_messages(place, kind, stream):
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    body = {"model": "goose", "messages": messages, "max_tokens": 5, "stream": stream}
    with (
        engine_of(kind, numbered()) as engine,
        gateway(place, engine, template=CHAT_TEMPLATE) as client,
    ):
        if stream:
            chunks = events(client, CHATS, **body)
            text = "".join(c["choices"][0]["delta"]["content"] or "" for c in chunks)
        else:
            text = ask(client, path=CHATS, **body)["choices"][0]["message"]["content"]
    assert text.endswith("3 4 5")
    (asked,) = engine.requests
    assert [each["role"] for each in asked["messages"]] == ["system", "user"]


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_a_chat_goes_to_the_expert_of_its_last_user_message(place, before):
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


@each_kind
@pytest.mark.parametrize(("model", "who"), [("e3", "e3"), (f"{BASE}:e1", "e1"), (BASE, BASE)])
def test_experts_and_the_base_are_passed_on(place, kind, model, who):
    with engine_of(kind, numbered()) as engine, gateway(place, engine) as client:
        reply = ask(client, **{**ASK, "model": model})
        first = text_of(reply).split()[0]
        assert first == (who if who == BASE else text_with(who, kind))
        assert reply["model"] == model


def test_an_unknown_model_is_refused_and_not_asked_for(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        error = error_of(client, 404, **{**ASK, "model": "gose"})
        assert error["code"] == "model_not_found"
        assert error["message"].endswith("Did you mean 'goose'?")
        assert not engine.requests


def test_models_are_listed(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["auto", "goose", *NAMES]
        assert cards[0]["router"] == "retrieval"
        assert cards[0]["context"] == 512
        assert cards[2]["experts"] == ["e0"]
        assert client.get("/v1/models/e1").json()["id"] == "e1"


def test_a_request_chooses_another_router_and_other_experts(place):
    with engine_of("llama.cpp", numbered()) as engine, gateway(place, engine) as client:
        reply = client.post(PATH, json={**ASK, "router": "centroid", "k": 2, "leave_out": ["e0"]})
        assert reply.status_code == 200, reply.text
        named = reply.headers["x-phatgoose-experts"].split(", ")
        assert len(named) == 2
        assert "e0" not in reply.headers["x-phatgoose-experts"]
        assert error_of(client, **{**ASK, "router": "phatgoose"})["param"] == "router"
        assert error_of(client, **{**ASK, "model": "e1", "k": 2})["param"] == "k"


def test_router_auto_is_the_first_that_the_experts_allow(place):
    wanted = first_allowed(Routing("auto"), Pool.open(place), BY_PROMPT).router
    assert wanted != "centroid"
    with (
        engine_of("vllm", numbered()) as engine,
        gateway(place, engine, router="centroid") as client,
    ):
        reply = ask(client, **ASK, router="auto", routing=True)
        assert reply["choices"][0]["routing"]["router"] == wanted


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"routing": {"trace": True}}, "routing"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2000}, "max_tokens"),
        ({"prompt": "to be " * 600}, "max_tokens"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"keep": ["nobody"]}, "keep"),
    ],
)
def test_what_no_engine_does_is_refused_here(place, change, param):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        assert error_of(client, **{**ASK, **change})["param"] in (param, "prompt")
        assert not engine.requests


def test_an_echo_is_the_gateway_s_own(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        assert text_of(ask(client, **{**ASK, "echo": True})).startswith(f"{ASK['prompt']}e")
        texts = [c["choices"][0]["text"] for c in events(client, **{**ASK, "echo": True})]
        assert "".join(texts).count(ASK["prompt"]) == 1
        assert "echo" not in engine.requests[0]


def test_sampling_is_what_the_request_says_and_nothing_else(place):
    for kind, plain in (("vllm", {"top_k": -1, "min_p": 0.0}), ("llama.cpp", {"top_k": 0})):
        with engine_of(kind, numbered()) as engine, gateway(place, engine) as client:
            ask(client, model="e0", prompt="hi", top_p=0.5, stop=["x"], ignore_eos=True)
        asked = engine.requests[0]
        wanted = {"temperature": 1, "top_p": 0.5, "stop": ["x"], "ignore_eos": True, **plain}
        assert {key: asked[key] for key in wanted} == wanted
        assert asked["max_tokens"] == 16


def test_tokens_are_passed_on_as_tokens(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        ask(client, **{**ASK, "prompt": [5, 6, 7]})
    assert engine.requests[0]["prompt"] == [5, 6, 7]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_adapters_that_are_missing_are_loaded(place, kind):
    with engine_of(kind, numbered(("e0",))) as engine, gateway(place, engine) as client:
        assert [each["lora_name"] for each in engine.loaded] == ["e1", "e2", "e3"]
        assert engine.loaded[0]["lora_path"] == str((place / "e1").resolve())
        assert text_of(ask(client, **{**ASK, "model": "e3"})).startswith("e3")


def test_adapters_from_another_place_are_loaded_again(place, tmp_path):
    (tmp_path / "link").symlink_to(place)
    held = {"e0": "/other/e0", "e1": "experts/e1", "e2": f"{tmp_path}/link/e2", "e3": "3"}
    with engine_of("vllm", held) as engine, gateway(place, engine) as client:
        wanted = {"lora_name": "e0", "lora_path": str((place / "e0").resolve())}
        assert engine.loaded == [{**wanted, "load_inplace": True}, wanted]
        assert text_of(ask(client, **{**ASK, "model": "e0"})).startswith("e0")


@pytest.mark.parametrize(("kind", "loads"), [("vllm", False), ("sglang", True)])
def test_adapters_from_another_place_that_can_not_be_loaded_again_are_refused(place, kind, loads):
    with (
        engine_of(kind, {**numbered(), "e1": "/other/e1"}, loads=loads) as engine,
        pytest.raises(ConfigError, match=r"holds another e1 \(from /other/e1, not from .*/e1\)"),
        gateway(place, engine),
    ):
        pass


def test_files_of_llama_cpp_that_lie_elsewhere_are_warned_of(place, caplog):
    with engine_of("llama.cpp", numbered()) as engine, gateway(place, engine):
        assert "has e1 from /x/e1.gguf, which is not beside" in caplog.text


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


def test_an_engine_that_is_away_at_start_is_an_error(place):
    with engine_of("vllm", {}) as engine:
        pass
    with pytest.raises(ConfigError, match="is away"), gateway(place, engine):
        pass


def test_what_is_no_engine_is_an_error(place):
    with (
        engine_of("other", {}) as engine,
        pytest.raises(ConfigError, match="--upstream-kind"),
        gateway(place, engine),
    ):
        pass


def test_a_router_for_tokens_is_refused(place):
    with (
        engine_of("vllm", numbered()) as engine,
        pytest.raises(ConfigError, match="doesn't choose by a prompt alone"),
        gateway(place, engine, router="phatgoose"),
    ):
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


def test_the_gateway_has_keys_and_limits_of_its_own(place):
    limits = Serving()
    with (
        engine_of("vllm", numbered()) as engine,
        gateway(place, engine, limits, api_keys=["k"]) as client,
    ):
        assert client.post(PATH, json=ASK).status_code == 401
        client.headers["Authorization"] = "Bearer k"
        ask(client, **ASK)
        assert error_of(client, **{**ASK, "n": 65})["param"] == "n"
        told = client.get("/metrics").text
    assert "phatgoose_chosen_total" in told
    assert 'phatgoose_generated_tokens_total{model="auto"} 7.0' in told
    assert "phatgoose_choice_seconds_count 1.0" in told


def test_users_mix_for_themselves_where_the_engine_mixes(place):
    body = {**ASK, "weights": {"e0": 0.25, "e2": -0.5, "e3": 0}, "routing": True}
    with engine_of("llama.cpp", numbered()) as engine, gateway(place, engine) as client:
        reply = ask(client, **body)
        assert text_of(reply).startswith("e0*0.25+e2*-0.5 0")
        assert reply["choices"][0]["routing"]["summary"] == {"e0": 0.25, "e2": -0.5}
        error = error_of(client, **{**ASK, "weights": {"e00": 1}})
        assert error["param"] == "weights"
        assert error["message"].endswith("Did you mean 'e0'?")
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        assert "can't mix" in error_of(client, **body)["message"]
        assert text_of(ask(client, **{**ASK, "weights": {"e3": 1}})).startswith("e3")
        assert text_of(ask(client, **{**ASK, "weights": {"e3": 0}})).startswith(BASE)
