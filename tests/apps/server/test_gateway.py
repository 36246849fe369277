"""The gateway: who is chosen, what the engine is asked for in its form, what comes back.

And an engine that is away, slow, restarted or killed: errors say so, and nobody else is harmed.
"""

import json
import logging
import re
import shutil
import time

import pytest

from fake_engine import ASK, BASE, CACHED, NAMES, PIECES, chosen_by, engine_of, gateway, numbered
from phatgoose.apps.server import Upstream
from phatgoose.config import Serving
from phatgoose.errors import ConfigError, PoolError
from phatgoose.experts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.experts.expert import LAYOUT
from serving import (
    CHATS,
    JSON,
    PATH,
    ask,
    beside,
    chunks_of,
    error_of,
    health_of,
    text_of,
    until,
)
from topic_prompts import BEFORE, OWNERS, PROMPTS

EXPERT = {**ASK, "model": "e1"}
STREAM = {**EXPERT, "stream": True}


pytestmark = pytest.mark.usefixtures("embedder_for_all")


@pytest.fixture(scope="module")
def fake():
    with engine_of() as engine:
        yield engine


@pytest.fixture
def engine(fake):
    """An engine for all tests, which is well."""
    fake.requests.clear()
    with fake.hanging("well"):
        yield fake


@pytest.fixture(scope="module")
def client(place, fake, embedder_for_all):
    with gateway(place, fake) as client:
        yield client


def name_of(chosen):
    return next(iter(chosen))


def chosen_in(reply):
    """The experts that the answer is from."""
    assert reply.status_code == 200, reply.text
    header = reply.headers["x-phatgoose-experts"]
    return {each.partition("=")[0] for each in header.split(", ")}


def status_is(client, status):
    until(lambda: client.get("/healthz").status_code == status)


def test_prompts_and_numbers_are_single_requests_of_the_expert_that_is_chosen(
    place, engine, client
):
    assert error_of(client, **ASK, routing="trace")["param"] == "routing"  # which no engine has
    prompts = ["Tell me of birds", "zzz qqq"]
    reply = client.post(PATH, json={**ASK, "prompt": prompts, "n": 2, "seed": 7})
    choices, names = reply.json()["choices"], [name_of(chosen_by(place, p)) for p in prompts]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [each["text"].split()[0] for each in choices] == [n for n in names for _ in range(2)]
    assert sorted(each["seed"] for each in engine.requests) == [7, 8, 9, 10]
    assert "n" not in engine.requests[0]
    assert reply.json()["usage"]["completion_tokens"] == 4 * (PIECES + 1)
    assert reply.headers["x-phatgoose-experts"] == "; ".join(f"{name}=1" for name in names)
    assert text_of(client, **{**ASK, "model": BASE}).split()[0] == BASE


def test_a_chat_goes_to_the_expert_of_its_last_user_message(engine, client):
    before = name_of(BEFORE.values())
    for prompt, owner in zip(PROMPTS, OWNERS, strict=True):
        turns = [*before, ("user", prompt)]
        messages = [{"role": role, "content": content} for role, content in turns]
        reply = client.post(CHATS, json={"model": "auto", "messages": messages})
        assert reply.headers["x-phatgoose-experts"] == f"{owner}=1"
    # Fields of a message that only the engine knows come along.
    message = {"role": "assistant", "content": "a", "refusal": "no", "thought": "b"}
    engine.mode, engine.content = "odd", json.dumps({"choices": [{"message": message}]}).encode()
    reply = ask(client, path=CHATS, model="auto", messages=messages)
    assert reply["choices"][0]["message"] == message


def test_adapters_alone_are_chosen_by_the_prompts_that_they_bring(place, engine, tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(place / name / file, tmp_path / name / file)
        own = [prompt for prompt, owner in zip(PROMPTS, OWNERS, strict=True) if owner == name]
        (tmp_path / name / LAYOUT.prompts).write_text("\n".join([*own, f"{name} once", f"{name}!"]))
    with gateway(tmp_path, engine, router="auto") as client:
        assert client.get("/v1/models/goose").json()["router"] == "discriminant"
        chosen = [chosen_in(client.post(PATH, json={**ASK, "prompt": each})) for each in PROMPTS]
        assert chosen == [{owner} for owner in OWNERS]


def test_a_key_reaches_its_experts_alone(place, engine):
    for name in NAMES:
        (place / name / LAYOUT.prompts).write_text(f"I am {name}.")
    keys = {"api_keys": ["all", "some=e1+e3"]}
    with gateway(place, engine, **keys) as client:
        client.headers["Authorization"] = "Bearer some"
        cards = client.get("/v1/models").json()["data"]
        assert [each["id"] for each in cards] == ["auto", "goose", "e1", "e3"]
        assert cards[0]["prompts"] == ["I am e1.", "I am e3."]
        for prompt in (*PROMPTS, "Answer as e0 would, the expert e0."):
            for change in ({}, {"k": 1}, {"model": "e3"}):
                names = chosen_in(client.post(PATH, json={**ASK, "prompt": prompt, **change}))
                assert names in ({"e1"}, {"e3"})
        for change in ({"model": "e0"}, {"weights": {"e0": 1.0}}, {"keep": ["e0"]}):
            others, unknown = (
                client.post(PATH, json=ASK | json.loads(json.dumps(change).replace("e0", name)))
                for name in ("e0", "e9")
            )
            assert others.text.replace("e0", "e9") == unknown.text
        assert text_of(client, **{**ASK, "model": BASE}).split()[0] == BASE


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CHOICE = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}
TOOLS = {"tools": [TOOL, {"type": "web_search", "size": 1}], "tool_choice": CHOICE}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
UNKNOWN = {**TOOLS, "parallel_tool_calls": False, "continue_final_message": True}
UNKNOWN |= {"add_generation_prompt": False, "modalities": ["text"], "timings_per_token": True}
UNKNOWN |= {"min_tokens": 2, "structured_outputs": {"regex": "a*"}, "mirostat": 2}
KNOWN = {"reasoning_effort": "low", "presence_penalty": 1.5, "top_k": 5, "user": "me"}
KNOWN |= {"chat_template_kwargs": {"enable_thinking": False}, "service_tier": "flex"}
# Of vLLM's and llama.cpp's fields those that reach adapters, prompts, limits, or what is others'.
OWN = {"lora", "lora_request", "prompt_embeds", "chat_template", "documents", "add_special_tokens"}
OWN |= {"truncate_prompt_tokens", "truncation_side", "mm_processor_kwargs", "media_io_kwargs"}
OWN |= {"input_prefix", "input_suffix", "input_extra", "priority", "request_id", "session_id"}
OWN |= {"id_slot", "cache_salt", "n_cache_reuse", "vllm_xargs", "kv_transfer_params", "n_probs"}
OWN |= {"chat_format", "chat_parser", "n_predict", "n_cmpl", "prompt_logprobs", "echo"}
OWN |= {"ec_transfer_params", "sse_ping_interval"}
TALK = [
    {"role": "user", "content": "Tell me of birds"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "user", "content": [{"type": "text", "text": "so", "cache_control": {}}]},
]


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_what_the_gateway_does_not_know_is_forwarded_unless_it_is_strict(place, kind):
    body = {"model": "e1", "messages": TALK, **UNKNOWN, **KNOWN, "repetition_penalty": 1.1}
    name = "repeat_penalty" if kind == "llama.cpp" else "repetition_penalty"
    with engine_of(kind) as engine:
        with gateway(place, engine) as client:
            ask(client, path=CHATS, **body, stream_options={"include_usage": True})
            (sent,) = engine.requests
            assert "stream_options" not in sent
            assert {**sent, **UNKNOWN, **KNOWN, "messages": TALK, name: 1.1} == sent
            ask(client, model="e1", prompt="a", echo=True)
            far = '{"model": "e1", "prompt": "a", "far": [1e999]}'  # which is strict JSON
            assert client.post(PATH, content=far, headers=JSON).status_code == 200
            assert engine.requests[-1]["far"] == [None]
            for own in OWN:
                error = error_of(client, path=CHATS, **body, **{own: [1]})
                assert error["message"].startswith(f"{own} isn't forwarded")
            for own in ("messages", "tools", "documents", "chat_template", "truncation", "seconds"):
                error = error_of(client, path=CHATS, **body | {"chat_template_kwargs": {own: [1]}})
                assert error["message"].startswith(f"chat_template_kwargs: {own} is not a variable")
            for path, own in ((CHATS, "prompt"), (PATH, "max_completion_tokens")):
                asked = {"messages": TALK} if path == CHATS else {"prompt": "a"}
                error = error_of(client, path=path, model="e1", **asked, **{own: 3})
                assert error["message"].startswith(f"{own} isn't forwarded")
        with gateway(place, engine, Serving(strict=True)) as client:
            assert error_of(client, path=CHATS, **body)["param"] == "continue_final_message"
            ask(client, path=CHATS, model="e1", messages=TALK, tools=[TOOL], **KNOWN)


def test_an_answer_comes_as_the_engine_gave_it(engine, client):
    message = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"}
    usage = {"prompt_tokens": 99, "completion_tokens": 4, "total_tokens": 103, "details": {"a": 1}}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "stop_reason": 7}
    told = {"id": "x", "choices": [choice], "usage": usage, "system_fingerprint": "f"}
    engine.mode, engine.content = "odd", json.dumps(told).encode()
    body = {"model": "e1", "messages": TALK, "tools": [TOOL]}
    reply, same = ask(client, path=CHATS, **body), {**message, "refusal": None}
    assert reply["choices"] == [{**choice, "message": same, "routing": None, "logprobs": None}]
    assert (reply["usage"], reply["system_fingerprint"]) == (usage, "f")
    assert reply["id"].startswith("chatcmpl-")
    delta = {"tool_calls": [{"index": 0, **CALL}]}
    told = {"choices": [{"index": 0, "delta": delta}], "prompt_token_ids": [1]}
    engine.content = json.dumps(told).encode()
    first, second, *others = chunks_of(client, CHATS, **body)
    assert second["prompt_token_ids"] == [1]
    assert others
    assert "prompt_token_ids" not in str(others)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0]["delta"] == {"content": None, **delta}


@pytest.mark.parametrize("keys", [["one"], ["one", "two=e1"]])
@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_no_client_learns_which_prompts_of_others_the_engine_knows(place, kind, keys):
    counts = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    known = {"timings": {"cache_n": 8}, "__verbose": {"tokens_cached": 8}}
    usage = {**counts, "prompt_tokens_details": CACHED}
    choice = {"index": 0, "finish_reason": "stop", "stop_reason": 7}
    whole = {"choices": [{**choice, "text": "a"}], "usage": usage, **known}
    chunk = {"choices": [{**choice, "message": {"content": "a"}}], "usage": usage, **known}
    with engine_of(kind) as engine, gateway(place, engine, api_keys=keys) as client:
        engine.mode = "odd"
        for key in keys * 2:
            client.headers["Authorization"] = f"Bearer {key.partition('=')[0]}"
            engine.content = json.dumps(whole).encode()
            reply = ask(client, **EXPERT)
            engine.content = json.dumps(chunk).encode()
            chunks = chunks_of(client, **EXPERT, stream_options={"include_usage": True})
            is_told = kind == "vllm" or len(keys) == 1
            assert reply["usage"] == (usage if is_told else counts)
            assert ("timings" in reply, "__verbose" in reply) == (is_told, is_told)
            assert reply["choices"][0]["stop_reason"] == 7
            assert ("cache" in str(chunks)) == is_told
            assert chunks[-1]["usage"].get("prompt_tokens_details") == (CACHED if is_told else None)
        salts = [each.get("cache_salt") for each in engine.requests]
    if kind == "llama.cpp":  # which has no such field
        assert {*salts} == {None}
        return
    of_keys = [{*salts[n :: 2 * len(keys)]} for n in range(0, 2 * len(keys), 2)]
    assert [len(each) for each in of_keys] == [1] * len(keys)  # a client's is always the same
    assert len(set.union(*of_keys)) == len(keys)
    assert all(re.fullmatch("[0-9a-f]{64}", salt) for salt in salts)  # as vLLM takes it


@pytest.mark.parametrize(
    ("kind", "plain"), [("vllm", {"top_k": -1, "min_p": 0.0}), ("llama.cpp", {"top_k": 0})]
)
def test_a_mixture_goes_over_where_the_engine_mixes_and_sampling_as_it_is(place, kind, plain):
    chosen = chosen_by(place, ASK["prompt"], "centroid")
    with engine_of(kind) as engine, gateway(place, engine, router="centroid") as client:
        reply = client.post(PATH, json={**ASK, "routing": True})
        ask(client, model="e0", prompt="a", top_p=0.5, stop=["x"], ignore_eos=True)
    report = reply.json()["choices"][0]["routing"]
    assert len(chosen) == 3
    assert (report["router"], list(report["experts"])) == ("centroid", list(chosen))
    if kind == "llama.cpp":
        scales = {each["id"]: each["scale"] for each in engine.requests[0]["lora"]}
        wanted = {int(numbered()[name]): pytest.approx(w) for name, w in chosen.items()}
        assert {number: scale for number, scale in scales.items() if scale} == wanted
        assert report["summary"] == {n: pytest.approx(w, abs=1e-4) for n, w in chosen.items()}
        assert report["chosen"] is None
    else:
        assert report["summary"] == {name_of(chosen): 1.0}
        assert list(report["chosen"]) == list(chosen)
        assert reply.headers["x-phatgoose-experts"] == f"{name_of(chosen)}=1"
    wanted = {"temperature": 1, "top_p": 0.5, "stop": ["x"], "ignore_eos": True, **plain}
    wanted |= {"max_tokens": 16, "prompt": "a"}
    assert {key: engine.requests[1][key] for key in wanted} == wanted


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
            assert health_of(client)["upstream"] == "away"
    (line,) = [each.getMessage() for each in caplog.records if "be used" in each.getMessage()]
    assert all(part in line for part in said.split(".*"))
    assert "\n" not in line


def test_prompts_are_read_by_the_reader_of_the_experts_and_nothing_of_a_base_is_loaded(
    place, engine, tmp_path
):
    for name in NAMES:
        shutil.copytree(place / name, tmp_path / name)
        config = tmp_path / name / "phatgoose.json"
        record = json.loads(config.read_text())
        record["base"] = {"id": "nobody/nowhere", "revision": "0" * 40, "fingerprint": None}
        config.write_text(json.dumps(record))
    router = "discriminant:fallback=off"
    with gateway(tmp_path, engine, router=router) as client:
        for prompt in PROMPTS:
            chosen = chosen_by(place, prompt, router)
            assert text_of(client, **{**ASK, "prompt": prompt}).split()[0] == name_of(chosen)
        assert (
            not client.app.state.service.text_processes
        )  # no process for a template, or a tokenizer
        assert client.get("/v1/models/goose").json()["chat"]
    config.write_text(json.dumps(record | {"reader": None}))
    with (
        pytest.raises(PoolError, match=r"earlier releases did; .* phatgoose stats"),
        gateway(tmp_path, engine, router=router),
    ):
        pass
    stranger = record["reader"] | {"id": "nobody/reader"}
    for name in NAMES:
        config = tmp_path / name / "phatgoose.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"reader": stranger}))
    with (
        pytest.raises(ConfigError, match=r"read by 'nobody/reader:1-1', and only .*--reader"),
        gateway(tmp_path, engine, router=router),
    ):
        pass


def test_a_router_for_every_token_is_refused_in_front_of_an_engine(place, engine):
    with (
        pytest.raises(ConfigError, match="doesn't choose by a prompt alone"),
        gateway(place, engine, router="phatgoose"),
    ):
        pass


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_an_answer_has_a_limit_that_the_client_wants_or_that_surely_fits(place, kind):
    """An engine that counts tokens itself refuses more than fits, and ends what has no limit."""
    short, long = ([{"role": "user", "content": "hi " * n}] for n in (9, 140))
    with engine_of(kind) as engine, gateway(place, engine, Serving(max_tokens=200)) as client:
        for messages, wish, sent in (
            (short, {}, 200),
            (short, {"max_tokens": -1}, 200),
            (short, {"max_completion_tokens": 7}, 7),
            (long, {}, None),
            (long, {"max_tokens": -1}, None),
            (long, {"max_tokens": 7}, 7),
        ):
            ask(client, path=CHATS, model="e1", messages=messages, **wish)
            assert engine.requests[-1].get("max_tokens") == sent
        ask(client, model="e1", prompt="hi " * 140)
        assert engine.requests[-1]["max_tokens"] == 16
        ask(client, model="e1", prompt="hi " * 140, max_tokens=-1)
        assert "max_tokens" not in engine.requests[-1]
        body = {"model": "e1", "messages": long, "max_tokens": 150}
        reply = client.post(CHATS, json=body)  # cut as it may be, or refused by who counts
        assert reply.status_code == (400 if kind == "vllm" else 200)


def test_a_text_that_says_nothing_is_for_the_base(place, engine):
    blank = [{"role": "user", "content": " "}]
    for router in ("discriminant", "discriminant:fallback=off", "retrieval"):
        with gateway(place, engine, router=router) as client:
            for path, body in ((PATH, {"prompt": ""}), (CHATS, {"messages": blank})):
                reply = client.post(path, json={"model": "auto", **body})
                assert chosen_in(reply) == {"base"}
            replies = client.post(PATH, json={**ASK, "prompt": ["", PROMPTS[0], " "]})
            assert replies.headers["x-phatgoose-experts"].split("; ")[::2] == ["base=1"] * 2


ADDRESSES = ("localhost:8000", "http://me:secret@host", "me:secret@host", "http://[host")
ADDRESSES += ("http://host:port", "ftp://host")


@pytest.mark.parametrize(
    ("url", "key"),
    [(url, None) for url in ADDRESSES] + [("http://host", key) for key in ("s\nt", "secret ", "é")],
)
def test_odd_addresses_are_refused_without_their_secrets(url, key):
    with pytest.raises(ConfigError, match=r"address .* without a password.* visible") as error:
        Upstream(url, key)
    assert "secret" not in str(error.value)


def test_the_engine_s_key_is_sent_and_never_shown(place, caplog):
    caplog.set_level(logging.DEBUG)
    key = 'very-"secret'
    with engine_of() as engine:
        engine.key = key
        with gateway(place, engine, key=key) as client:
            assert "secret" not in repr(client.app.state.service.backend.links.links[0].upstream)
            ask(client, **ASK)
            engine.content = json.dumps({"error": {"headers": key}}).encode()
            for stream in (False, True):
                engine.mode = "repeating"  # what it was sent, the key among it
                reply = client.post(PATH, json={**ASK, "stream": stream})
                assert "Bearer …" in reply.json()["error"]["message"]
                engine.mode = "odd"
                reply = client.post(PATH, json={**ASK, "stream": stream})
                assert "The engine failed" in reply.text
                assert "secret" not in reply.text
            engine.key = "changed"
            assert error_of(client, 502, **ASK)["message"] == "The engine failed by 401: wrong key."
    assert "secret" not in caplog.text


# An engine that fails.


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
        assert text_of(client, **EXPERT).startswith("e1")
        del engine.adapters["e1"]  # which it has lost otherwise
        assert error_of(client, 503, **EXPERT)["message"].startswith("The engine doesn't know")
        until(lambda: "e1" in engine.adapters)
        ask(client, **EXPERT)


def test_adapters_that_have_other_numbers_after_a_restart_are_found(place):
    with engine_of("llama.cpp") as engine, gateway(place, engine) as client:
        engine.stop()
        engine.adapters = numbered(NAMES[::-1])
        status_is(client, 503)
        engine.start()
        status_is(client, 200)
        assert text_of(client, **EXPERT).startswith("e1*1 ")


@pytest.mark.parametrize("mode", ["broken", "unfinished"])
def test_a_stream_that_breaks_off_ends_with_an_error_and_is_not_sent_again(engine, client, mode):
    engine.mode = mode
    *pieces, last = chunks_of(client, **EXPERT)
    assert (len(pieces), last["error"]["code"]) == (3, "upstream_broken")
    assert len(engine.requests) == 1
    engine.mode = "well"
    assert "error" not in chunks_of(client, **EXPERT)[-1]


def test_an_engine_that_is_killed_amid_streams_ends_them_all(place):
    with engine_of() as engine, gateway(place, engine) as client:
        engine.mode = "stalled"
        running = [beside(chunks_of, client, **EXPERT) for _ in range(5)]
        until(lambda: engine.open == 5)
        time.sleep(0.1)
        engine.stop()
        codes = {each.result(10)[-1]["error"]["code"] for each in running}
    assert codes == {"upstream_broken"}


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
def test_an_error_of_the_engine_is_passed_on_and_nothing_sent_twice(
    engine, client, mode, status, code
):
    engine.mode, engine.content = mode, b"<html>"
    error = error_of(client, status, **EXPERT)
    assert error["code"] == code
    assert "/secret" not in error["message"]
    assert "\n" not in error["message"]
    assert len(engine.requests) == 1
    if mode in ("refusing", "busy", "failing"):
        assert client.post(PATH, json=STREAM).status_code == status


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"choices": [{"text": "\\ud800"}]}',
        b'{"choices": [{"text": "a", "score": NaN}]}',
        b'{"choices": [{"text": "a", "logprobs": {"content": [{"token": "a"}]}}]}',
        b'{"choices": [{"text": ["a"]}]}',
        b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": 1%s}}' % (b"0" * 400),
        b'{"choices": [{"message": {"content": "a", "tool_calls": ["x"]}}]}',
        b'{"choices": [{"message": {"tool_calls": [{"function": {"arguments": 3}}]}}]}',
        b"\xff",
        b'{"choices": []}',
    ],
    ids=lambda content: str(content[:60]),
)
def test_an_answer_of_another_form_is_a_502(engine, client, content):
    engine.mode, engine.content = "odd", content
    for body in [EXPERT] if content in (b"\xff", b'{"choices": []}') else [EXPERT, STREAM]:
        assert error_of(client, 502, **body)["code"] == "upstream_broken"


def test_an_answer_may_be_as_long_as_what_was_asked_for(engine, client):
    engine.mode = "odd"
    for length, status in ((900_000, 200), (1_200_000, 502)):
        engine.content = json.dumps({"choices": [{"text": "x" * length}]}).encode()
        assert client.post(PATH, json=EXPERT).status_code == status
    for body in (EXPERT, STREAM):
        assert "The engine answers more than" in error_of(client, 502, **body)["message"]
    engine.mode = "endless"  # a stream that nobody asked for
    assert error_of(client, 502, **EXPERT)["code"] == "upstream_failed"


def test_an_endless_stream_waits_for_who_reads_it_and_ends_with_its_time(place):
    limits = Serving(timeout=2)
    with engine_of() as engine, gateway(place, engine, limits, listens=True) as client:
        engine.mode = "endless"
        with client.stream("POST", PATH, json=STREAM) as reply:
            lines = reply.iter_lines()
            next(lines)
            before = -1
            while before < engine.sent < 1000:  # of 64 KiB each
                before = engine.sent
                time.sleep(0.5)
            assert engine.sent < 1000
            assert any('"timeout"' in line for line in lines)
        until(lambda: engine.open == 0)


def test_a_stream_that_does_not_begin_is_given_up_at_the_deadline(place, engine):
    with gateway(place, engine, Serving(timeout=1)) as client, engine.hanging("slow"):
        assert client.post(PATH, json=STREAM).status_code == 504


def test_more_answers_than_the_queue_holds_are_refused(place, engine):
    with gateway(place, engine, Serving(max_queue=4)) as client:
        with engine.hanging("slow"):
            running = [beside(ask, client, **EXPERT) for _ in range(2)]
            until(lambda: engine.open == 2)
            assert error_of(client, 429, **EXPERT)["code"] == "overloaded"  # half is a client's
        for each in running:
            each.result(30)
        assert error_of(client, 429, **EXPERT, n=3)["code"] == "overloaded"
        with engine.hanging("slow"):  # so they are where experts are chosen for all at once
            running = [beside(client.post, PATH, json=ASK) for _ in range(8)]
            until(lambda: sum(each.done() for each in running) == 6)
        assert sorted(each.result(30).status_code for each in running) == [200] * 2 + [429] * 6
