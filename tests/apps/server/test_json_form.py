"""Answers in JSON (`response_format`): they keep to their schema, or the refusal says why."""

import json

import pytest

from phatgoose.apps.server.local import json_form
from serving import GREEDY, ask, error_of, text_of

needs_library = pytest.mark.skipif(json_form.LLMatcher is None, reason="needs phatgoose[json]")
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["bird", "fish"]}, "note": {"type": "string", "maxLength": 3}},
    "required": ["kind", "note"],
    "additionalProperties": False,
}


def by(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


@needs_library
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_random_models_answers_keep_to_the_schema(client, temperature):
    plain = text_of(client, **GREEDY)
    body = {**GREEDY, "max_tokens": 80, "temperature": temperature, "seed": 3}
    choices = ask(client, **body, n=3, response_format=by(SCHEMA))["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        answer = json.loads(choice["text"])
        assert list(answer) == ["kind", "note"]
        assert answer["kind"] in ("bird", "fish")
        assert len(answer["note"]) <= 3
    assert (len({choice["text"] for choice in choices}) > 1) == bool(temperature)
    assert text_of(client, **GREEDY) == plain


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@needs_library
@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strange"}, "form: The JSON can't be written: Invalid type: strange"),
        ({"$ref": "#"}, "can't"),
        (ENDLESS, "The JSON can't be written"),
    ],
    ids=str,
)
def test_forms_that_cannot_be_are_refused(client, schema, said):
    error = error_of(client, **{**GREEDY, "max_tokens": 80}, response_format=by(schema))
    assert said in error["message"]


def test_without_the_library_it_is_refused_with_what_to_do(client, monkeypatch):
    monkeypatch.setattr(json_form, "LLMatcher", None)
    error = error_of(client, **GREEDY, response_format={"type": "json_object"})
    assert "pip install 'phatgoose[json]'" in error["message"]
    assert error["param"] == "response_format"
