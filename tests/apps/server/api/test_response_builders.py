"""Progress of answers, put into whole responses and chunks."""

from __future__ import annotations

import json

import pytest

from phatgoose.apps.server.models import ModelRunner
from phatgoose.apps.server.protocol import ChatRequest, CompletionRequest
from phatgoose.apps.server.requests import PreparedRequest, RequestPreparer
from phatgoose.apps.server.responses import builder_of
from phatgoose.apps.server.sequences import Progress, ScoredToken
from phatgoose.base.loading import UNFINISHED
from phatgoose.config import Serving
from serving import CHAT_TEMPLATE

SPECIAL = {"<pad>", "</s>", "<unk>"}
PROGRESS = [
    Progress(0, "one ", (), (), None, 1),
    Progress(0, "two", (), (), "stop", 2),
]


@pytest.fixture
def prepared(llama):
    llama.tokenizer.chat_template = CHAT_TEMPLATE
    preparer = RequestPreparer(ModelRunner(llama.model, llama.tokenizer), Serving())

    def prepare(request) -> PreparedRequest:
        return preparer.prepare(request, preparer.prompts(request))

    return prepare


def test_a_completion_is_its_pieces_joined(prepared):
    request = prepared(CompletionRequest(model="goose", prompt="ab", max_tokens=4))
    reply = builder_of(request).whole([PROGRESS]).model_dump()
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "stop")
    assert reply["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert reply["id"].startswith("cmpl-")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["😀 hi", [3, 1, 200, 98]], ids=["text", "tokens"])
def test_offsets_point_to_where_tokens_begin(client, prompt, stream):
    """The tokenizer has a token for each byte of a character, and none of text for an end."""
    asked = {"model": "goose", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 40}
    asked |= {"temperature": 2, "seed": 5, "ignore_eos": True, "stream": stream}
    reply = client.post("/v1/completions", json=asked)
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    parts = [json.loads(line)["choices"][0] for line in lines if line != "[DONE]"]
    text = "".join(part["text"] for part in parts)
    tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
    offsets = [place for part in parts for place in part["logprobs"]["text_offset"]]
    if isinstance(prompt, str):
        assert offsets[:7] == [0, 0, 0, 0, 1, 2, 3]
    assert offsets == sorted(offsets)
    for token, place, then in zip(tokens, offsets, [*offsets[1:], len(text)], strict=True):
        if token not in SPECIAL | {UNFINISHED} and then > place:  # the last token of its text
            assert text[place:then] == token


def test_special_tokens_of_an_echoed_text_have_their_place(client):
    asked = {"model": "goose", "prompt": "ab</s>cd", "echo": True, "logprobs": 1, "max_tokens": 3}
    (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
    told = choice["logprobs"]
    assert told["tokens"][:5] == ["a", "b", "</s>", "c", "d"]
    assert told["text_offset"][:6] == [0, 1, 2, 6, 7, 8]


def test_parts_of_a_character_have_no_bytes(prepared):
    messages = [{"role": "user", "content": "ab"}]
    request = ChatRequest(model="goose", messages=messages, logprobs=True, top_logprobs=1)
    tokens = [ScoredToken(UNFINISHED, 0, -1.0, ((UNFINISHED, -1.0),)), ScoredToken("é", 0, -1.0)]
    whole = [[Progress(0, "é", tuple(tokens), (), "stop", 2)]]
    (choice,) = builder_of(prepared(request)).whole(whole).model_dump()["choices"]
    first, last = choice["logprobs"]["content"]
    assert first["bytes"] is first["top_logprobs"][0]["bytes"] is None
    assert last["bytes"] == list("é".encode())


def test_a_chat_is_streamed_in_chunks_that_end_with_a_count(prepared):
    messages = [{"role": "user", "content": "ab"}]
    builder = builder_of(prepared(ChatRequest(model="goose", messages=messages, max_tokens=4)))
    chunks = [*builder.opening(), *map(builder.chunk, PROGRESS)]
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == "one two"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.id for chunk in chunks} == {builder.closing().id}
    assert builder.closing().usage.completion_tokens == 2
