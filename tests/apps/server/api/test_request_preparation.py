"""Prompts checked against what the model can hold."""

from __future__ import annotations

import pytest

from phatgoose.apps.server.models import ModelRunner
from phatgoose.apps.server.protocol import ApiError, ChatRequest, CompletionRequest
from phatgoose.apps.server.requests import RequestPreparer
from phatgoose.config import Serving
from short_bases import few_places
from tiny import with_added

GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}


PATH = "/v1/completions"


def test_what_cannot_fit_is_refused_before_it_is_read(client, app, monkeypatch):
    def read(*_, **__):
        raise AssertionError("the prompt was read")

    tokenizer = app.state.service.models["goose"].runner.tokenizer
    for name in ("__call__", "decode"):
        monkeypatch.setattr(type(tokenizer), name, read)
    for prompt in ("a" * 40_000, [5] * 3000, ["a", "a" * 40_000]):
        error = client.post(PATH, json={**GREEDY, "prompt": prompt}).json()["error"]
        assert error["param"] == "prompt"
        assert error["code"] == "context_length_exceeded"


def asked(prompt, **fields) -> CompletionRequest:
    return CompletionRequest(model="goose", prompt=prompt, **fields)


def test_more_than_an_encoder_or_a_decoder_holds_is_a_400():
    base = few_places("bart")
    preparer = RequestPreparer(ModelRunner(base.model, base.tokenizer), Serving())
    for text, tokens, words in (
        ("a" * 30, 4, "The prompt has 31 tokens; the model's encoder can hold 24."),
        ("a", 25, "max_tokens is 25; the model's decoder can hold 24."),
    ):
        request = asked(text, max_tokens=tokens)
        (prompt,) = preparer.prompts(request)
        with pytest.raises(ApiError) as refusal:
            preparer.decoding(request, 0, prompt)
        assert (refusal.value.status_code, refusal.value.detail) == (400, words)
    chat = ChatRequest(model="goose", messages=[{"role": "user", "content": "a"}])
    assert preparer.decoding(chat, 0, prompt).max_tokens == 24


def test_a_text_that_an_answer_follows_has_no_end(llama):
    tokenizer = with_added(["<bos>"], ["</s>"])
    runner = ModelRunner(llama.model, tokenizer)
    (prompt,) = RequestPreparer(runner, Serving()).prompts(asked("ab"))
    assert tokenizer.decode(list(prompt.tokens)) == "<bos>ab"
