"""Schemas that want all time or memory: they are refused, and others are served."""

import json
import sys

import pytest

from phatgoose.apps.server.local.json_form import Limits, Proof
from phatgoose.config import Serving
from serving import CHAT, CHAT_TEMPLATE, CHATS, GREEDY, ask, beside, error_of, held, until

pytest.importorskip("llguidance", reason="needs phatgoose[json]")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")

PRIMES = {"allOf": [{"type": "integer", "multipleOf": n} for n in (10007, 10009)]}
PATTERNS = {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b.*"} for n in range(1, 16)]}
MANY = {"properties": {f"k{n}": True for n in range(9000)}}
COLOUR = {"enum": ["red", "blue"]}
LIMITS = "it takes more than 2 s or 64 MiB to compile."


def by(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def forms_of(client):
    return client.app.state.service.backend.forms


@pytest.fixture
def client(client_with):
    return client_with(Serving(timeout=60), template=CHAT_TEMPLATE)


@linux
@pytest.mark.parametrize("schema", [PRIMES, PATTERNS, MANY], ids=["primes", "patterns", "fields"])
def test_a_schema_without_end_is_refused_and_others_are_served(client, schema):
    endless = [beside(error_of, client, **GREEDY, **by(schema)) for _ in range(3)]
    assert ask(client, **GREEDY)["choices"]
    for each in endless:
        error = each.result()
        assert error["message"] == f"Answers can't keep to this form: {LIMITS}"
        assert error["param"] == "response_format"
    fields = {**GREEDY, "max_tokens": 80, **by(COLOUR)}
    assert json.loads(ask(client, **fields)["choices"][0]["text"]) in COLOUR["enum"]
    forms_of(client).limits = Limits(longest=0)  # neither is proven again
    assert error_of(client, **GREEDY, **by(schema))["message"].endswith(LIMITS)
    assert ask(client, **fields)["choices"]


@pytest.mark.parametrize("schema", [5, True, "object", []])
def test_a_schema_that_is_no_object_is_refused(client, schema):
    error = error_of(client, **GREEDY, **by(schema))
    assert error["message"].startswith("response_format.json_schema: ")
    assert "the schema must be an object" in error["message"]
    assert ask(client, **GREEDY, **by({}))["choices"]


@linux
def test_tools_without_end_are_refused(client):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": PRIMES}}}
    asked = {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    error = error_of(client, path=CHATS, **CHAT, **asked)
    assert error["message"].endswith(LIMITS)
    assert error["param"] == "tools"


@linux
def test_memory_is_limited_and_what_is_left_comes_back(client):
    forms = forms_of(client)
    forms.limits = Limits(memory=1 << 20)
    assert "or 1 MiB to compile" in error_of(client, **GREEDY, **by(PATTERNS))["message"]
    forms.limits = Limits(large=0, most_large=2)
    forms.prove = lambda *_: Proof("", 1)
    with held():
        holds = [beside(ask, client, **GREEDY, **by({"const": f"the {n}"})) for n in (1, 2)]
        engine = client.app.state.service.backend.engine
        until(lambda: engine.waiting + len(engine.running) == 2)
        error = error_of(client, 429, **GREEDY, **by({"const": 3}))
        assert error["message"].startswith("Too many large schemas")
    for each in holds:
        each.result()
    until(lambda: client.post("/v1/completions", json={**GREEDY, **by({"const": 3})}).is_success)


def test_a_process_without_time_to_answer_is_no_fault_of_the_schema(client):
    forms_of(client).limits = Limits(longest=0.01)
    error = error_of(client, 429, **GREEDY, **by(COLOUR))
    assert error["message"].startswith("The server had no time to compile the schema")
    forms_of(client).limits = Limits()
    assert ask(client, **GREEDY, **by(COLOUR))["choices"]  # it isn't remembered


def test_the_proofs_that_are_remembered_are_bounded(client):
    forms_of(client).limits = Limits(proofs=2)
    for value in range(4):
        ask(client, **GREEDY, **by({"const": value}))
    assert len(forms_of(client).proofs) == 2
