"""Answers: completions, chats, streams, log-probabilities and routing, of models of each kind."""

import itertools
import json
from contextlib import closing
from http.client import HTTPConnection

import pytest

import serving
from phatgoose.apps.server import create_app, served_models
from phatgoose.base import load_base
from phatgoose.config import Serving
from phatgoose.errors import BaseModelError
from phatgoose.routing.compose import compose, save
from serving import CHATS, GREEDY, JSON, PATH, PROMPT, ask, error_of, events, text_of

LONG = {**GREEDY, "max_tokens": 1000}


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def test_a_greedy_completion_is_what_generate_gives(client, pool, tokenizer):
    prompt = tokenizer(PROMPT)["input_ids"]
    tokens = serving.generated(pool, prompt, 6)
    reply = ask(client, **GREEDY)
    (choice,) = reply["choices"]
    assert choice["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert (reply["object"], reply["id"][:5]) == ("text_completion", "cmpl-")
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
    assert reply["usage"] == {**counts, "total_tokens": len(prompt) + len(tokens)}


def test_stop_ends_an_answer(client):
    whole = text_of(client, **{**GREEDY, "max_tokens": 30})
    stop = whole[3:5]
    for wish in (stop, ["nothing", stop]):
        (choice,) = ask(client, **{**GREEDY, "max_tokens": 30, "stop": wish})["choices"]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_a_chat_is_the_completion_of_its_template(chat):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "Brief."}, {"role": "user", "content": parts}]
    wish = {"model": "goose", "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    reply = ask(chat, path=CHATS, **wish)
    wanted = ask(chat, **{**GREEDY, "prompt": "[system] Brief.\n[user] hi\n[assistant] "})
    assert reply["usage"] == wanted["usage"]
    content = wanted["choices"][0]["text"]
    message = reply["choices"][0]["message"]
    assert message == {"role": "assistant", "content": content, "refusal": None}


@pytest.mark.parametrize(
    "wish",
    [
        {"router": "merged"},
        {"router": "arrow:temperature=0.01,form=peft", "k": 1},
        {"k": 1},
        {"keep": ["e1", "e2"]},
        {"leave_out": ["e0"]},
        {"router": "single:expert=e2"},
    ],
    ids=str,
)
def test_a_request_may_have_its_own_routing(client, pool, tokenizer, wish):
    prompt = tokenizer(PROMPT)["input_ids"]
    wanted = serving.generated(pool, prompt, 6, **wish)
    assert wanted != serving.generated(pool, prompt, 6)
    text = tokenizer.decode(wanted, skip_special_tokens=True)
    assert text_of(client, **GREEDY, **wish) == text


def test_routing_tells_each_tokens_experts(client, tokenizer):
    count = len(tokenizer(PROMPT)["input_ids"])
    (choice,) = ask(client, **GREEDY, routing="trace")["choices"]
    routing = choice["routing"]
    assert (routing["router"], routing["k"]) == ("phatgoose", 2)
    parts = [token["part"] for token in routing["tokens"]]
    assert parts == ["prompt"] * count + ["answer"] * 6
    assert "".join(token["token"] for token in routing["tokens"][:count]) == PROMPT
    for token in routing["tokens"][:-1]:
        assert sum(token["experts"].values()) == pytest.approx(1, abs=0.01)
        assert list(token["experts"].values()) == sorted(token["experts"].values(), reverse=True)
    assert routing["tokens"][-1]["experts"] == {}  # it never passed the model
    assert routing["trace"]["format"] == "phatgoose-trace-1"
    assert routing["trace"]["whole"] == []


def test_a_stream_tells_its_routing_piece_by_piece(client):
    wish = {**GREEDY, "routing": "trace"}
    whole = ask(client, **wish)["choices"][0]["routing"]
    parts = [c["choices"][0]["routing"] for c in events(client, **wish)]
    parts = [part for part in parts if part]
    assert joined(part["tokens"] for part in parts) == whole["tokens"]
    assert parts[0]["trace"]["streams"][0]["sites"] == whole["trace"]["streams"][0]["sites"]
    tokens = joined(part["trace"]["streams"][0]["tokens"] for part in parts)
    assert tokens == whole["trace"]["streams"][0]["tokens"]


def test_a_saved_model_and_a_base_alone_are_served_too(pool, tmp_path, tokenizer):
    save(
        compose(pool, load_base(pool.base.id, dtype="float32"), k=1, router="phatgoose"),
        tmp_path / "routed",
    )
    places = [str(tmp_path / "routed"), f"base={pool.base.id}", f"pool={serving.folder_of(pool)}"]
    app = create_app(served_models(places, dtype="float32"))
    wanted = serving.generated(pool, tokenizer(PROMPT)["input_ids"], 6, k=1)
    with serving.client_of(app) as client:
        saved = {**GREEDY, "model": "routed"}
        text = text_of(client, **saved)
        assert text == tokenizer.decode(wanted, skip_special_tokens=True)
        assert "can't be changed" in error_of(client, **saved, k=2)["message"]
        alone = {**GREEDY, "model": "base"}
        assert text_of(client, **alone) != text
        assert "base model alone" in error_of(client, **alone, routing=True)["message"]
        assert "can't be changed" in error_of(client, **alone, k=1)["message"]
        assert client.get("/v1/models/base").json()["router"] is None


def test_an_encoder_decoder_model_is_refused(pool_of):
    with pytest.raises(BaseModelError, match="doesn't serve it"):
        serving.app_of(pool_of("t5"))


def test_a_request_that_takes_too_long_is_ended(pool):
    app = serving.app_of(pool, Serving(timeout=1, max_tokens=2000), endless=True)
    engine, wish = app.state.service.backend.engine, {**LONG, "max_tokens": 1990}
    with serving.client_of(app) as client:
        with serving.held(2):
            assert error_of(client, 504, **wish)["code"] == "timeout"
        serving.until(lambda: engine.running == 0)
        with serving.held(2):
            reply = client.post(PATH, json={**wish, "stream": True})
        *_, last = reply.text.strip().split("data: ")
        assert json.loads(last)["error"]["code"] == "timeout"
        serving.until(lambda: engine.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(pool, stream):
    app = serving.app_of(pool, endless=True)
    engine, routings = app.state.service.backend.engine, app.state.service.routings

    def post(client, **body):
        client.request("POST", PATH, json.dumps(body), JSON)

    with (
        serving.running(app) as address,
        closing(HTTPConnection(address.removeprefix("http://"), timeout=60)) as client,
    ):
        with serving.held(2):
            post(client, **LONG, stream=stream, k=1)
            if stream:
                with client.getresponse() as reply:
                    assert reply.readline().startswith(b"data: ")
            serving.until(lambda: engine.running == 1)
            (row,) = [row for batch in engine.batches for row in batch.sequences]
            client.close()
            serving.until(lambda: row.is_cancelled)
        serving.until(lambda: engine.running == engine.waiting == 0)
        serving.until(lambda: serving.needed(routings) == 0)
        post(client, **GREEDY)
        with client.getresponse() as reply:
            assert reply.status == 200
