"""Requests parsed at bounded cost and refused in few words."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server import requests as request_parsing
from phatgoose.apps.server.protocol import ApiError, ChatRequest, CompletionRequest
from phatgoose.apps.server.requests import parsed

MIB = 1 << 20


GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}


JSON = {"Content-Type": "application/json"}


PATH = "/v1/completions"


def joined_to_a_mib(before: bytes, piece: bytes, after: bytes) -> bytes:
    room = (MIB - len(before) - len(after)) // (len(piece) + 1)
    return before + b",".join([piece] * room) + after


HOSTILE = {
    "objects": joined_to_a_mib(b'{"model":"goose","prompt":[', b"{}", b"]}"),
    "lists": joined_to_a_mib(b'{"model":"goose","prompt":[', b"[]", b"]}"),
    "texts": joined_to_a_mib(b'{"model":"goose","prompt":[', b'""', b"]}"),
    "tokens": joined_to_a_mib(b'{"model":"goose","prompt":[', b"1", b"]}"),
    "numbers": joined_to_a_mib(b'{"model":"goose","prompt":[', b"0.5", b"]}"),
    "mixed": joined_to_a_mib(b'{"model":"goose","prompt":["a",', b"1", b"]}"),
    "messages": joined_to_a_mib(b'{"model":"goose","prompt":"a","messages":[', b"{}", b"]}"),
    "biases": b'{"model":"goose","prompt":"a","logit_bias":{'
    + b",".join(b'"zebra%d":1' % i for i in range(60_000))
    + b"}}",
    "fields": b'{"model":"goose",' + b",".join(b'"zebra%d":1' % i for i in range(60_000)) + b"}",
    "one name": b'{"model":"goose","' + b"zebra" * 200_000 + b'":1}',
    "one model": b'{"prompt":"a","model":"' + b"zebra" * 200_000 + b'"}',
    "one router": b'{"prompt":"a","model":"goose","router":"' + b"zebra" * 200_000 + b'"}',
    "one expert": b'{"prompt":"a","model":"goose","keep":["' + b"zebra" * 200_000 + b'"]}',
    "one stop": b'{"prompt":"a","model":"goose","stop":"' + b"zebra" * 200_000 + b'"}',
    "one text": b'{"model":"goose","prompt":"' + b"zebra" * 200_000 + b'"}',
    "deep": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 200_000,
    "digits": b'{"model":"goose","prompt":"a","seed":' + b"9" * 1_000_000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_body_of_a_mib_costs_is_bounded_and_nothing_of_it_is_repeated(client, name):
    reply = client.post(PATH, content=HOSTILE[name], headers=JSON)
    assert reply.status_code == 400
    assert len(reply.content) < 1000
    assert reply.text.count("zebra") < 20
    assert "input" not in reply.json()["error"]


@pytest.mark.parametrize("wanted", [CompletionRequest, ChatRequest])
@pytest.mark.parametrize("fault", [{}, [], "", 0.5, [{}], {"x": {}}], ids=str)
def test_lists_are_looked_through_to_their_first_fault_alone(wanted, fault):
    """However long they are, few errors are made of them: each costs a KiB."""
    lists = {name: [fault] * 300 for name in ("prompt", "messages", "keep", "stop", "tools")}
    with pytest.raises(ValidationError) as wrong:
        wanted.model_validate({"model": "goose", **lists, "logit_bias": {"1": 1}})
    assert wrong.value.error_count() < 16


def test_lists_are_counted_before_they_are_made(monkeypatch):
    monkeypatch.setattr(request_parsing, "from_json", None)
    for name in ("objects", "lists", "fields", "biases", "deep", "deep objects"):
        with pytest.raises(ApiError, match="objects and lists"):
            parsed(CompletionRequest, HOSTILE[name])


@pytest.mark.parametrize(
    "text", ["[{:" * 40_000, '"[\\"{:\\\\' * 40_000, "\\" * 40_000 + "[" * 20_000]
)
def test_what_stands_in_texts_is_not_counted(text):
    body = json.dumps({"model": text[:9], "prompt": text}).encode()
    assert parsed(CompletionRequest, body).prompt == text


@pytest.mark.parametrize(
    "field",
    [
        '"prompt": "\\ud800"',
        '"prompt": ["a", "\\udfff b"]',
        '"stop": "\\ud800"',
        '"user": "\\ud800"',
        '"temperature": NaN',
        '"temperature": Infinity',
        '"temperature": 1e999',
        '"top_p": -1e999',
        '"seed": ' + "9" * 5000,
        '"seed": 1e400',
        '"n": 1' + "0" * 400,
        '"prompt": ' + "[" * 500 + "]" * 500,
    ],
    ids=lambda field: field[:30],
)
def test_what_is_no_text_and_no_number_is_refused(client, field):
    reply = client.post(PATH, content=f'{{"model": "goose", {field}}}', headers=JSON)
    assert reply.status_code == 400
    messages = '{"model": "goose", "messages": [{"role": "user", "content": "\\ud800"}]}'
    reply = client.post("/v1/chat/completions", content=messages, headers=JSON)
    assert reply.status_code == 400


def test_names_in_errors_are_cut_and_printable(client):
    name = "\x1b[31m" + "x" * 300
    for change in ({"model": name}, {name: 1}, {"routing": {"layer": name}}):
        reply = client.post(PATH, json={**GREEDY, **change})
        message = reply.json()["error"]["message"]
        assert reply.status_code in (400, 404)
        assert message.isprintable()
        assert len(message) < 200
    names = [f"zebra{number}" + "x" * 490 for number in range(1000)]
    reply = client.post(PATH, json={**GREEDY, "leave_out": names})
    assert reply.status_code == 400
    assert len(reply.content) < 1000
    assert client.get("/v1/models/%1B%5B31m" + "x" * 3000).json()["error"]["message"].isprintable()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("prompt", [], "prompt: List should have at least 1 item"),
        ("prompt", ["a", 3], "prompt.1: Input should be a valid string"),
        ("prompt", [[1, 2], []], "prompt.1: List should have at least 1 item"),
        ("prompt", 5, "prompt: Input should be a valid string"),
        ("stop", "", "stop: String should have at least 1 character"),
        ("stop", ["a", ""], "stop.1: String should have at least 1 character"),
        ("stop", ["a"] * 17, "stop: List should have at most 16 items"),
        ("routing", {"layr": "1"}, "routing.layr: Extra inputs are not permitted"),
        ("str", 1, "str: Extra inputs are not permitted"),
        ("keep", "a", "keep: Input should be a valid list"),
    ],
)
def test_the_fault_is_named_that_the_value_has(field, value, complaint):
    """Pydantic gives one error for each form of a field, by names that no client knows."""
    with pytest.raises(ApiError) as wrong:
        parsed(CompletionRequest, json.dumps({**GREEDY, field: value}).encode())
    assert str(wrong.value.detail).startswith(complaint)
    assert wrong.value.body["error"]["param"] == field


def test_the_fault_of_a_message_is_named():
    for content, complaint in (
        ([], "messages.0.content: List should have at least 1 item"),
        ([{"type": "image_url", "text": ""}], "messages.0.content.0.type: Input should be 'text'"),
    ):
        body = {"model": "goose", "messages": [{"role": "user", "content": content}]}
        with pytest.raises(ApiError) as wrong:
            parsed(ChatRequest, json.dumps(body).encode())
        assert str(wrong.value.detail).startswith(complaint)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ('"max_tokens": 1, "max_tokens": 1', "max_tokens"),
        ('"mod\\u0065l": "mean"', "model"),
        ('"stream_options": {"include_usage": true, "include_usage": false}', "include_usage"),
        ('"x\\u001b": 1, "x\\u001b": 1', "x\\x1b"),
        ('"' + "x" * 999 + '": 1, "' + "x" * 999 + '": 2', "x" * 59),
    ],
)
def test_a_key_that_appears_twice_is_refused_by_name(client, fields, key):
    body = f'{{"model": "goose", "prompt": "a", {fields}}}'
    reply = client.post(PATH, content=body, headers=JSON)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["message"] == f"The key {key} appears twice in one object."
    assert (error["param"], error["code"]) == (key, "invalid_request")


def test_the_same_key_in_two_objects_is_no_fault(client):
    messages = '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]'
    assert parsed(ChatRequest, f'{{"model": "goose", "messages": {messages}}}'.encode())
