"""Requests: refused in few words at bounded cost, and prepared within what the model can hold."""

import sys
import time

import pytest

from phatgoose import untrusted_text
from phatgoose.apps.server import ServedModel, create_app
from phatgoose.apps.server.protocol import ApiError, without_paths
from phatgoose.apps.server.requests import check_body
from phatgoose.base import load_base
from phatgoose.config import Routing, Serving
from phatgoose.routing.routers.auto import settled
from serving import (
    CHAT,
    CHATS,
    GREEDY,
    JSON,
    PATH,
    app_of,
    ask,
    beside,
    client_of,
    error_of,
    folder_of,
    health_of,
    until,
)

MIB = 1 << 20


def test_router_auto_is_the_first_that_base_and_experts_allow(client, pool):
    """Whatever the model is served with."""
    base = load_base(pool.base.id, dtype="float32")
    wanted = settled(Routing("auto"), pool, base.model, base.tokenizer).router
    assert wanted != "phatgoose"
    for kept in (pool.names, pool.names[:2]):
        asked = {**GREEDY, "routing": True, "keep": kept}
        choice = ask(client, **asked, router="auto")["choices"][0]
        assert choice["routing"]["router"] == wanted
        assert choice == ask(client, **asked, router=wanted)["choices"][0]


def test_without_a_chat_template_there_are_no_chats(client):
    assert "no default chat template" in error_of(client, path=CHATS, **CHAT)["message"]


def body_of(field):
    return b'{"model": "goose", "prompt": "a", ' + field.encode() + b"}"


def schema_of(value):
    return body_of('"response_format": {"json_schema": {"schema": {"const": ' + value + "}}}")


def filled(before, piece, after=b"]}"):
    """A body of a MiB: many pieces in a list or object of a request."""
    before = b'{"model":"goose",' + before
    return before + b",".join([piece] * ((MIB - len(before) - 9) // (len(piece) + 1))) + after


ZEBRAS = b",".join(b'"zebra%d":1' % i for i in range(60_000))
MANY = {  # objects and lists
    "objects": filled(b'"prompt":[', b"{}"),
    "biases": body_of('"logit_bias": {' + ZEBRAS.decode() + "}"),
    "fields": b'{"model":"goose",' + ZEBRAS + b"}",
    "deep": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 200_000,
}
HOSTILE = {
    **MANY,
    "tokens": filled(b'"prompt":[', b"1"),
    "one model": b'{"prompt":"a","model":"' + b"zebra" * 200_000 + b'"}',
    "digits": body_of('"seed": ' + "9" * 1_000_000),
    "no end": b"{",
    "no text": b'{"prompt": "\xff"}',
    "nothing": b"null",
    "half a character": b'{"model": "goose", "prompt": "\\ud800"}',
    "half a message": b'{"model": "goose", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a stop": body_of('"stop": "\\ud800"'),
    "no number": body_of('"temperature": NaN'),
    "large number": body_of('"n": 1' + "0" * 400),
    "lists": b'{"model": "goose", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    # Strict where any JSON is taken, too.
    "no schema": schema_of("NaN"),
    "half a schema": schema_of('"\\ud800"'),
    "deep schema": schema_of("[" * 250 + "]" * 250),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", [PATH, CHATS])
def test_what_a_body_of_a_mib_costs_is_bounded_and_nothing_of_it_is_repeated(client, path, name):
    reply = client.post(path, content=HOSTILE[name], headers=JSON)
    assert reply.status_code == 400
    assert len(reply.content) < 1000
    assert reply.text.count("zebra") < 20
    error = reply.json()["error"]
    assert error["message"].startswith("The body is no JSON: " if "schema" in name else "")
    assert error["message"]
    assert "input" not in error


def test_lists_are_counted_before_they_are_made():
    for body in MANY.values():
        with pytest.raises(ApiError, match="objects and lists"):
            check_body(body)
    check_body(b'{"prompt": "' + b"[" * 100_000 + b'"}')


def test_names_in_errors_are_cut_and_printable(client):
    name = "\x1b[31m" + "x" * 300
    names = [f"zebra{number}" + "x" * 490 for number in range(1000)]
    changes = ({name: 1}, {"routing": {"layer": name}}, {"leave_out": names}, {"model": name})
    for change in changes:
        error = error_of(client, 404 if "model" in change else 400, **{**GREEDY, **change})
        assert error["message"].isprintable()
        assert len(error["message"]) < 600
    assert client.get("/v1/models/%1B%5B31m" + "x" * 3000).json()["error"]["message"].isprintable()


# Chat templates and tokenizers that take all time or memory, or aren't there.

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{% set a = 9 %}{{ a ** (a ** a) }}"
DOUBLED = (
    "{% set x = namespace(y='a' * 999) %}{% for i in range(60) %}{% set x.y = x.y + x.y %}"
    "{% endfor %}{{ x.y | length }}"
)


def two_bases(pool_of, template):
    """A client of experts of one base, which has `template`, and of another as "other"."""
    places = {"goose": folder_of(pool_of("llama")), "other": folder_of(pool_of("gpt2"))}
    app = create_app([ServedModel(n, str(p), dtype="float32") for n, p in places.items()])
    app.state.service.models["goose"].runner.tokenizer.chat_template = template
    return client_of(app)


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize("template", [POWER, DOUBLED])
def test_a_template_that_wants_everything_keeps_nobody_else_waiting(pool_of, monkeypatch, template):
    monkeypatch.setattr(untrusted_text, "SECONDS", 1)
    monkeypatch.setattr(untrusted_text, "MEMORY", 256 << 20)
    with two_bases(pool_of, template) as client:
        chats = [beside(error_of, client, path=CHATS, **CHAT) for _ in range(2)]
        until(lambda: health_of(client)["reading"])
        ask(client, **{**GREEDY, "model": "other"})
        assert template == DOUBLED or not chats[1].done()
        for chat in chats:
            error = chat.result()
            assert (error["param"], error["code"]) == ("messages", "prompt_unreadable")
            words = "The base's chat template or tokenizer failed: it took too much time or memory."
            assert error["message"] == words
        ask(client, **GREEDY)
        until(lambda: not health_of(client)["running"])
        assert health_of(client) == {"status": "ok", "waiting": 0, "running": 0, "reading": 0}


def test_the_server_stops_at_once_beside_a_template_that_takes_for_ever(pool_of):
    with two_bases(pool_of, POWER) as client:
        chat = beside(error_of, client, 503, CHATS, **CHAT)
        until(lambda: health_of(client)["reading"])
        begun = time.monotonic()
        client.portal.call(client.app.state.service.close)
        assert chat.result(30)["message"] == "The server was stopped."
        assert time.monotonic() - begun < untrusted_text.SECONDS


def test_a_request_that_a_template_outlasts_is_a_504(pool):
    app = app_of(pool, Serving(timeout=1), template=LOOP)
    with client_of(app) as client:
        late = error_of(client, 504, CHATS, **CHAT)
        assert late["message"] == "The answer took longer than 1 seconds."
        until(lambda: not health_of(client)["reading"])
        ask(client, **GREEDY)


@pytest.mark.parametrize("problem", ["no processes", "no python"])
def test_a_process_that_cannot_be_started_is_the_server_s_fault(client, monkeypatch, problem):
    def fails(*_, **__):
        raise OSError("Resource temporarily unavailable")

    (texts,) = (process for process, _ in client.app.state.service._texts.values())
    texts._children[0].kill()
    texts._children[0].wait()
    with monkeypatch.context() as patch:
        if problem == "no processes":
            patch.setattr(untrusted_text, "Popen", fails)
        else:
            patch.setattr(untrusted_text, "START", "raise SystemExit")
        error = error_of(client, 503, **GREEDY)
    assert error["message"].startswith("The tokenizer's new process can't be read: ")
    assert error["type"] == "server_error"
    ask(client, **GREEDY)


# What is told of it.


def test_what_breaks_inside_is_not_told(client, monkeypatch):
    monkeypatch.setattr(client.app.state.service, "begun", object())  # which no JSON holds
    reply = client.get("/v1/models")
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "The server failed; its log says more."


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/home/me/experts/e0 has no gates.", "e0 has no gates."),
        ("'/home/me/my experts/e0': broken.", "'e0': broken."),
        ("experts/e0 has no gates, nor /a/b and /c/d.", "experts/e0 has no gates, nor b and d."),
        (r"C:\Users\me\e0: broken, ~/x/y too", "e0: broken, y too"),
        ("hub:me/x@v1 or https://a.example/x, 1/2 or m/s", None),
    ],
)
def test_paths_in_messages_are_cut(message, told):
    assert without_paths(message) == (message if told is None else told)
