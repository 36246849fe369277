"""Answers in JSON (`response_format`): they keep to their schema, or the refusal says why."""

import json

import pytest

from fake_engine import engine_of
from gateways import ASK, gateway, numbered
from phatgoose.apps.server.local.json_form import JsonForm, LLMatcher
from phatgoose.errors import EngineError
from serving import CHAT, CHATS, GREEDY, ask, error_of, events, text_of

needs_library = pytest.mark.skipif(LLMatcher is None, reason="needs phatgoose[json]")
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["bird", "fish"]}, "note": {"type": "string", "maxLength": 3}},
    "required": ["kind", "note"],
    "additionalProperties": False,
}


def by(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


def fits(text):
    found = json.loads(text)
    assert list(found) == ["kind", "note"]
    assert found["kind"] in ("bird", "fish")
    assert len(found["note"]) <= 3


@needs_library
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_random_models_answers_keep_to_the_schema(client, temperature):
    plain = text_of(client, **GREEDY)
    body = {**GREEDY, "max_tokens": 80, "temperature": temperature, "seed": 3}
    choices = ask(client, **body, n=3, response_format=by(SCHEMA))["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        fits(choice["text"])
    assert (len({choice["text"] for choice in choices}) > 1) == bool(temperature)
    assert text_of(client, **GREEDY) == plain


@needs_library
def test_chats_and_streams_keep_to_it_too(chat):
    body = {**CHAT, "max_tokens": 80, "temperature": 0, "response_format": by(SCHEMA)}
    whole = ask(chat, path=CHATS, **body)["choices"][0]["message"]["content"]
    fits(whole)
    chunks = events(chat, path=CHATS, **body)
    pieces = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c != "[DONE]"]
    assert "".join(pieces) == whole
    cut = ask(chat, path=CHATS, **{**body, "max_tokens": 4})["choices"][0]
    assert cut["finish_reason"] == "length"
    assert whole.startswith(cut["message"]["content"])


@needs_library
@pytest.mark.parametrize(
    ("format_", "said"),
    [
        (by({"type": "strange"}), "The schema can't be used: Invalid type: strange"),
        (by({"$ref": "#"}), "The schema can't be used: no answer can begin by it"),
        ({"type": "json_schema"}, "is for the type json_schema"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "is for the type json_schema"),
        ({"type": "xml"}, "response_format.type: Input should be 'text'"),
    ],
    ids=str,
)
def test_forms_that_cannot_be_are_refused(client, format_, said):
    error = error_of(client, **GREEDY, response_format=format_)
    assert said in error["message"]
    assert error["param"] == "response_format"


@needs_library
@pytest.mark.parametrize("place", ["#", "#/properties/a"])
def test_a_schema_without_an_end_is_refused_where_that_shows(client, place):
    schema = {"type": "object", "properties": {"a": {"$ref": place}}, "required": ["a"]}
    body = {**GREEDY, "max_tokens": 80, "response_format": by(schema)}
    assert "The JSON can't be written" in error_of(client, 400, **body)["message"]


@needs_library
def test_a_form_that_fails_harms_no_other_answer(client, monkeypatch):
    def fail(form, token):
        raise EngineError("The JSON can't be written: too much.")

    monkeypatch.setattr(JsonForm, "add", fail)
    error = error_of(client, 400, **GREEDY, response_format=by(SCHEMA))
    assert error["message"] == "The JSON can't be written: too much."
    assert text_of(client, **GREEDY)


def test_without_the_library_it_is_refused_with_what_to_do(client, monkeypatch):
    monkeypatch.setattr("phatgoose.apps.server.local.json_form.LLMatcher", None)
    error = error_of(client, **GREEDY, response_format={"type": "json_object"})
    assert "pip install 'phatgoose[json]'" in error["message"]
    assert error["param"] == "response_format"
    assert text_of(client, **GREEDY, response_format={"type": "text"})


@pytest.mark.usefixtures("embedder_for_all")
def test_a_gateway_hands_it_on(place):
    with engine_of("vllm", numbered()) as engine, gateway(place, engine) as client:
        for format_ in (by(SCHEMA), {"type": "json_object"}):
            ask(client, **ASK, response_format=format_)
            assert engine.requests[-1]["response_format"] == format_
        ask(client, **ASK)
        assert "response_format" not in engine.requests[-1]
