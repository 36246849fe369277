"""The server's interface: what it answers to whom, and what it refuses."""

from __future__ import annotations

import itertools
import json
import threading

import pytest

import serving
from phatgoose.apps.server import create_app, served_models
from phatgoose.base.loading import load_base
from phatgoose.config import Serving
from phatgoose.routing.compose import compose
from phatgoose.routing.saved.save import save

PROMPT = "to be or not"


GREEDY = {"model": "goose", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}


CHAT = {"model": "goose", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@pytest.fixture(scope="module")
def app(pool):
    return serving.app_of(pool, Serving(max_routings=2, max_queue=40))


@pytest.fixture(scope="module")
def client(app):
    with serving.client_of(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(pool):
    return load_base(pool.base.id, dtype="float32").tokenizer


def ask(client, status=200, path="/v1/completions", **body):
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def error_of(client, status=400, **body):
    return ask(client, status, **body)["error"]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def events(client, path="/v1/completions", **body):
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_greedy_completion_is_what_generate_gives(client, pool, tokenizer):
    prompt = tokenizer(PROMPT)["input_ids"]
    tokens = serving.generated(pool, prompt, 6)
    reply = ask(client, **GREEDY)
    (choice,) = reply["choices"]
    assert choice["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert reply["object"] == "text_completion"
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
    assert reply["usage"] == {**counts, "total_tokens": len(prompt) + len(tokens)}


def test_prompts_may_be_tokens_and_many(client, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in (PROMPT, "who?")]
    one, other = (
        ask(client, **{**GREEDY, "prompt": text})["choices"][0] for text in (PROMPT, "who?")
    )
    for prompts in ([PROMPT, "who?"], ids):
        choices = ask(client, **{**GREEDY, "prompt": prompts})["choices"]
        assert [choice["text"] for choice in choices] == [one["text"], other["text"]]
    assert ask(client, **{**GREEDY, "prompt": ids[0]})["choices"][0]["text"] == one["text"]
    assert len(ask(client, **{**GREEDY, "prompt": "", "max_tokens": 1})["choices"]) == 1


def test_several_answers_differ_and_the_same_seed_gives_the_same_ones(client):
    wish = {**GREEDY, "temperature": 1.5, "n": 3, "seed": 7}
    first, again = (ask(client, **wish)["choices"] for _ in range(2))
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert len({choice["text"] for choice in first}) == 3
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    second = ask(client, **{**wish, "n": 1, "seed": 8})["choices"][0]["text"]
    assert second == first[1]["text"]


def test_a_stream_makes_the_whole_answer(client):
    wish = {**GREEDY, "max_tokens": 20, "n": 2, "temperature": 1.2, "seed": 3, "logprobs": 1}
    whole = ask(client, **wish)
    chunks = events(client, **wish, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    for index in (0, 1):
        parts = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        wanted = whole["choices"][index]
        assert "".join(part["text"] for part in parts) == wanted["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == wanted["finish_reason"]
        assert joined(part["logprobs"]["tokens"] for part in parts) == wanted["logprobs"]["tokens"]
        offsets = joined(part["logprobs"]["text_offset"] for part in parts)
        assert offsets == wanted["logprobs"]["text_offset"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_echo_tells_the_prompt_and_its_log_probabilities(client, tokenizer):
    count = len(tokenizer(PROMPT)["input_ids"])
    (choice,) = ask(client, **{**GREEDY, "echo": True, "logprobs": 2})["choices"]
    alone = ask(client, **GREEDY)["choices"][0]["text"]
    assert choice["text"] == PROMPT + alone
    told = choice["logprobs"]
    assert "".join(told["tokens"][:count]) == PROMPT
    assert {len(part) for part in told.values()} == {count + 6}
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    for text, own, top in zip(
        told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True
    ):
        assert own <= max(top.values()) <= 0
        assert text in top
    for own, top in zip(told["token_logprobs"][count:], told["top_logprobs"][count:], strict=True):
        assert own == max(top.values())  # greedy, as lm-eval sees it
    chunks = events(client, **{**GREEDY, "echo": True})
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    scored = ask(client, **{**GREEDY, "echo": True, "logprobs": 0, "max_tokens": 0})
    assert scored["choices"][0]["text"] == PROMPT
    assert scored["usage"]["completion_tokens"] == 0


def test_stop_ends_an_answer(client):
    whole = ask(client, **{**GREEDY, "max_tokens": 30})["choices"][0]["text"]
    stop = whole[3:5]
    for wish in (stop, ["nothing", stop]):
        (choice,) = ask(client, **{**GREEDY, "max_tokens": 30, "stop": wish})["choices"]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"


@pytest.fixture(scope="module")
def chat(pool):
    """A client of a server whose base has a chat template."""
    app = serving.app_of(pool)
    for served in app.state.service.models.values():
        served.runner.tokenizer.chat_template = serving.CHAT_TEMPLATE
    with serving.client_of(app) as client:
        yield client


def test_a_chat_is_the_completion_of_its_template(chat):
    path = "/v1/chat/completions"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    wish = {"model": "goose", "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    reply = ask(chat, path=path, **wish, logprobs=True, top_logprobs=2)
    text = "[system] Be brief.\n[user] hi\n[assistant] "
    wanted = ask(chat, **{**GREEDY, "prompt": text})
    assert reply["usage"] == wanted["usage"]
    assert reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    content = wanted["choices"][0]["text"]
    assert choice["message"] == {"role": "assistant", "content": content, "refusal": None}
    assert len(choice["logprobs"]["content"]) == 6
    token = choice["logprobs"]["content"][0]
    assert token["logprob"] == token["top_logprobs"][0]["logprob"]
    assert bytes(token["bytes"]).decode() == token["token"]
    chunks = events(chat, path, **wish)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"]["content"] or "" for c in chunks) == content
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_without_a_limit_a_chat_takes_what_the_server_gives(pool):
    app = serving.app_of(pool, Serving(max_tokens=9))
    for served in app.state.service.models.values():
        served.runner.tokenizer.chat_template = serving.CHAT_TEMPLATE
        served.runner.ends = frozenset()
    with serving.client_of(app) as client:
        body = {**CHAT, "max_tokens": None}
        assert ask(client, path="/v1/chat/completions", **body)["usage"]["completion_tokens"] == 9


def test_a_developer_speaks_as_the_system_and_answers_may_be_sent_back(chat):
    told = {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": None}
    talk = [{"role": "developer", "content": "be"}, {"role": "user", "content": "hi"}, told]
    asked = {"model": "goose", "messages": talk, "max_tokens": 4, "temperature": 0}
    first = chat.post("/v1/chat/completions", json=asked).json()
    asked["messages"] = [{**talk[0], "role": "system"}, talk[1], {**told, "annotations": []}]
    second = chat.post("/v1/chat/completions", json=asked).json()
    assert first["choices"] == second["choices"]
    asked["messages"] = [{**told, "tool_calls": [{}]}]
    assert chat.post("/v1/chat/completions", json=asked).status_code == 400


def test_what_a_template_refuses_is_told(chat, client):
    path = "/v1/chat/completions"
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    error = error_of(chat, path=path, **{**CHAT, "messages": messages})
    assert "The system speaks first." in error["message"]
    error = error_of(client, path=path, **CHAT)
    assert "no chat template" in error["message"]
    error = error_of(chat, path=path, **CHAT, top_logprobs=3)
    assert error["param"] == "top_logprobs"


@pytest.mark.parametrize(
    "wish",
    [
        {"router": "merged"},
        {"router": "arrow", "k": 1},
        {"k": 1},
        {"keep": ["e1", "e2"]},
        {"leave_out": ["e0"]},
        {"router": "single", "keep": ["e3"]},
        {"router": "single:expert=e2"},
        {"router": "arrow:temperature=0.01,form=peft"},
    ],
    ids=str,
)
def test_a_request_may_have_its_own_routing(client, pool, tokenizer, wish):
    prompt = tokenizer(PROMPT)["input_ids"]
    wanted = serving.generated(pool, prompt, 6, **wish)
    assert wanted != serving.generated(pool, prompt, 6)
    text = ask(client, **GREEDY, **wish)["choices"][0]["text"]
    assert text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_models_by_name_are_told_apart(client):
    goose, mean = (
        ask(client, **{**GREEDY, "model": m})["choices"][0]["text"] for m in ("goose", "mean")
    )
    assert goose != mean
    assert ask(client, **GREEDY, router="merged")["choices"][0]["text"] == mean
    listed = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["router"]) for card in listed] == [
        ("goose", "phatgoose"),
        ("mean", "merged"),
    ]
    assert client.get("/v1/models/goose").json()["experts"] == ["e0", "e1", "e2", "e3"]
    assert client.get("/v1/models/duck").status_code == 404


def test_routing_tells_each_tokens_experts(client, tokenizer):
    count = len(tokenizer(PROMPT)["input_ids"])
    wish = {**GREEDY, "routing": {"layer": "1", "kind": "q_proj", "trace": True}}
    (choice,) = ask(client, **wish)["choices"]
    routing = choice["routing"]
    assert (routing["router"], routing["k"]) == ("phatgoose", 2)
    parts = [token["part"] for token in routing["tokens"]]
    assert parts == ["prompt"] * count + ["answer"] * 6
    assert "".join(token["token"] for token in routing["tokens"][:count]) == PROMPT
    for token in routing["tokens"][:-1]:
        assert sum(token["experts"].values()) == pytest.approx(1, abs=0.01)
        assert len(token["experts"]) == 2
        assert list(token["experts"].values()) == sorted(token["experts"].values(), reverse=True)
    assert routing["tokens"][-1]["experts"] == {}
    assert routing["trace"]["format"] == "phatgoose-trace-1"
    everywhere = ask(client, **GREEDY, routing=True)["choices"][0]["routing"]
    assert everywhere["trace"] is None
    assert max(len(token["experts"]) for token in everywhere["tokens"]) > 2


def test_a_trace_tells_who_was_chosen_for_the_whole_prompt(client, pool):
    wish = {**GREEDY, "router": "discriminant", "routing": {"trace": True}}
    (choice,) = ask(client, **wish)["choices"]
    ((expert, weight),) = choice["routing"]["trace"]["whole"]
    assert expert in pool.names
    assert weight == 1
    assert {expert} == set(choice["routing"]["tokens"][0]["experts"])
    (choice,) = ask(client, **GREEDY, routing={"trace": True})["choices"]
    assert choice["routing"]["trace"]["whole"] == []


def test_a_stream_tells_its_routing_piece_by_piece(client):
    wish = {**GREEDY, "routing": {"trace": True}}
    whole = ask(client, **wish)["choices"][0]["routing"]
    parts = [c["choices"][0]["routing"] for c in events(client, **wish)]
    parts = [part for part in parts if part]
    assert joined(part["tokens"] for part in parts) == whole["tokens"]
    assert parts[0]["trace"]["streams"][0]["sites"] == whole["trace"]["streams"][0]["sites"]
    assert [part["trace"] for part in parts[1:]] == [None] * (len(parts) - 1)
    tokens = parts[0]["trace"]["streams"][0]["tokens"]
    tokens += joined(more["tokens"] for part in parts[1:] for more in part["more"])
    assert tokens == whole["trace"]["streams"][0]["tokens"]


def test_routings_that_cannot_be_had_are_refused(client):
    assert "no expert 'e9'" in error_of(client, **GREEDY, keep=["e9"])["message"]
    assert (
        "No expert is left"
        in error_of(client, **GREEDY, leave_out=["e0", "e1", "e2", "e3"])["message"]
    )
    for router, said in (
        ("oracle", "one of random"),
        ("arrow:frm=peft", "router arrow: unknown setting 'frm'; known are form"),
        ("phatgoose:eps=0", "must be above 0"),
        ("phatgoose-input", "one of random"),
    ):
        error = error_of(client, **GREEDY, router=router)
        assert error["param"] == "router"
        assert said in error["message"]
    assert "embeddings" in error_of(client, **GREEDY, router="retrieval")["message"]
    assert "comparison" in error_of(client, **GREEDY, router="best-individual")["message"]
    assert "layers are 0, 1" in error_of(client, **GREEDY, routing={"layer": "7"})["message"]
    assert "mlp.up_proj" in error_of(client, **GREEDY, routing={"kind": "wq"})["message"]


def test_a_saved_model_and_a_base_alone_are_served_too(pool, tmp_path, tokenizer):
    save(compose(pool, load_base(pool.base.id, dtype="float32"), k=1), tmp_path / "routed")
    places = [str(tmp_path / "routed"), f"base={pool.base.id}", f"pool={serving.folder_of(pool)}"]
    app = create_app(served_models(places, dtype="float32"))
    wanted = serving.generated(pool, tokenizer(PROMPT)["input_ids"], 6, k=1)
    with serving.client_of(app) as client:
        saved = {**GREEDY, "model": "routed"}
        text = ask(client, **saved)["choices"][0]["text"]
        assert text == tokenizer.decode(wanted, skip_special_tokens=True)
        assert ask(client, **saved, k=2)["choices"][0]["text"] != text  # those of the pool
        alone = {**GREEDY, "model": "base"}
        assert ask(client, **alone)["choices"][0]["text"] != text
        assert "base model alone" in error_of(client, **alone, routing=True)["message"]
        assert "no experts" in error_of(client, **alone, k=1)["message"]
        assert client.get("/v1/models/base").json()["router"] is None


def test_an_encoder_decoder_model_is_served(pool_of, base_folders):
    pool = pool_of("t5")
    app = serving.app_of(pool)
    tokenizer = load_base(pool.base.id, dtype="float32").tokenizer
    wanted = serving.generated(pool, tokenizer(PROMPT)["input_ids"], 6)
    with serving.client_of(app) as client:
        (choice,) = ask(client, **GREEDY, routing=True)["choices"]
        assert choice["text"] == tokenizer.decode(wanted[1:], skip_special_tokens=True)
        streams = [token["stream"] for token in choice["routing"]["tokens"]]
        assert streams.count("encoder") == len(tokenizer(PROMPT)["input_ids"])
        assert "encoder-decoder" in error_of(client, **GREEDY, echo=True)["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "duck"}, "model"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 4}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"tools": []}, "tools"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": "x" * 3000}, "max_tokens"),
        ({"n": 100}, "n"),
        ({"stop": ""}, "stop"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(client, change, param):
    error = error_of(client, 404 if param == "model" else 400, **{**GREEDY, **change})
    assert error["param"] == param
    assert error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")


def test_what_is_no_json_is_refused(client):
    for body in (b"{", b"[" * 100_000, b'{"prompt": "\xff"}', b"null"):
        reply = client.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 400
        assert reply.json()["error"]["message"]
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"


def test_large_bodies_are_refused_by_length_and_by_what_comes(pool):
    app = serving.app_of(pool, Serving(max_body=1000))
    with serving.client_of(app) as client:
        assert error_of(client, 413, **{**GREEDY, "prompt": "x" * 2000})["code"] == "too_large"

        def pieces():
            yield from (b"x" * 400 for _ in range(4))

        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/completions", content=pieces(), headers=headers).status_code == 413
        ask(client, **GREEDY)


def test_keys_let_in_and_keep_out(pool):
    app = serving.app_of(pool, api_keys=("one", "two"))
    with serving.client_of(app) as client:
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
        refused = client.post(
            "/v1/completions", json=GREEDY, headers={"Authorization": "Bearer no"}
        )
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/healthz").status_code == client.get("/").status_code == 200
        schema = client.get("/openapi.json").json()
        assert schema["paths"]["/v1/models"]["get"]["security"]
        assert "security" not in schema["paths"]["/healthz"]["get"]


def endless(app):
    for served in app.state.service.models.values():
        served.runner.ends = frozenset()
    return app


def test_a_full_queue_turns_requests_away(pool):
    app = endless(serving.app_of(pool, Serving(max_queue=2, max_batch_tokens=60)))
    engine, wish = app.state.service.engine, {**GREEDY, "max_tokens": 40}
    with serving.client_of(app) as client:
        threads = [
            threading.Thread(target=client.post, args=("/v1/completions",), kwargs={"json": wish})
            for _ in range(3)
        ]
        with serving.held(1):
            for number, thread in enumerate(threads):  # one is computed, two wait
                thread.start()
                serving.until(lambda number=number: engine.running + engine.waiting == number + 1)
            reply = client.post("/v1/completions", json=GREEDY)
            assert reply.status_code == 429
            assert int(reply.headers["Retry-After"]) >= 1
            assert client.get("/healthz").json()["waiting"] == 2
        for thread in threads:
            thread.join()
