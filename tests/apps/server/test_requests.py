"""Requests: refused in few words at bounded cost, and prepared within what the model can hold."""

import sys
import time

import pytest

from phatgoose import untrusted_text
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
    client_of,
    error_of,
    in_a_thread,
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
        found = ask(client, **asked, router="auto")["choices"][0]
        assert found["routing"]["router"] == wanted
        assert found == ask(client, **asked, router=wanted)["choices"][0]


def test_without_a_chat_template_there_are_no_chats(client):
    assert "no default chat template" in error_of(client, path=CHATS, **CHAT)["message"]


def body_of(field: str) -> bytes:
    return b'{"model": "goose", "prompt": "a", ' + field.encode() + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"prompt": "\xff"}',
        b"null",
        b'{"model": "goose", "prompt": "\\ud800"}',
        b'{"model": "goose", "messages": [{"role": "user", "content": "\\ud800"}]}',
        body_of('"stop": "\\ud800"'),
        body_of('"temperature": NaN'),
        body_of('"seed": ' + "9" * 5000),
        body_of('"n": 1' + "0" * 400),
        b'{"model": "goose", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
    ids=lambda body: str(body[:60]),
)
def test_what_is_no_json_no_text_and_no_number_is_refused(client, body):
    for path in (PATH, CHATS):
        reply = client.post(path, content=body, headers=JSON)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"]


@pytest.mark.parametrize("odd", ["NaN", '"\\ud800"', "[" * 250 + "]" * 250])
def test_json_is_strict_where_any_is_taken_too(client, odd):
    schema = '{"type": "json_schema", "json_schema": {"schema": {"const": ' + odd + "}}}"
    body = body_of('"response_format": ' + schema)
    reply = client.post(PATH, content=body, headers=JSON)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("The body is no JSON: ")


def test_names_in_errors_are_cut_and_printable(client):
    name = "\x1b[31m" + "x" * 300
    names = [f"zebra{number}" + "x" * 490 for number in range(1000)]
    changes = ({name: 1}, {"routing": {"layer": name}}, {"leave_out": names}, {"model": name})
    for change in changes:
        error = error_of(client, 404 if "model" in change else 400, **{**GREEDY, **change})
        assert error["message"].isprintable()
        assert len(error["message"]) < 600
    assert client.get("/v1/models/%1B%5B31m" + "x" * 3000).json()["error"]["message"].isprintable()


def filled(before: bytes, piece: bytes, after: bytes = b"]}") -> bytes:
    """A body of a MiB: many pieces in a list or object of a request."""
    before = b'{"model":"goose",' + before
    return before + b",".join([piece] * ((MIB - len(before) - 9) // (len(piece) + 1))) + after


ZEBRAS = b",".join(b'"zebra%d":1' % i for i in range(60_000))
HERD = b'"' + b"zebra" * 200_000 + b'"'
HOSTILE = {
    "objects": filled(b'"prompt":[', b"{}"),
    "tokens": filled(b'"prompt":[', b"1"),
    "biases": b'{"model":"goose","prompt":"a","logit_bias":{' + ZEBRAS + b"}}",
    "fields": b'{"model":"goose",' + ZEBRAS + b"}",
    "one model": b'{"prompt":"a","model":' + HERD + b"}",
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


def test_lists_are_counted_before_they_are_made():
    for name in ("objects", "fields", "biases", "deep", "deep objects"):
        with pytest.raises(ApiError, match="objects and lists"):
            check_body(HOSTILE[name])
    check_body(b'{"prompt": "' + b"[" * 100_000 + b'"}')


# Chat templates and tokenizers that take all time or memory, or aren't there.

SLOW = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{% set a = 9 %}{{ a ** (a ** a) }}",
    "doubled": (
        "{% set x = namespace(y='a' * 999) %}{% for i in range(60) %}{% set x.y = x.y + x.y %}"
        "{% endfor %}{{ x.y | length }}"
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize("template", [SLOW["power"], SLOW["doubled"]])
def test_a_template_that_wants_everything_keeps_nobody_else_waiting(pool_of, monkeypatch, template):
    monkeypatch.setattr(untrusted_text, "SECONDS", 1)
    monkeypatch.setattr(untrusted_text, "MEMORY", 256 << 20)
    app = two_bases(pool_of, template)
    with client_of(app) as client:
        chats = [in_a_thread(client.post, CHATS, json=CHAT) for _ in range(2)]
        until(lambda: client.get("/healthz").json()["reading"])
        begun = time.monotonic()
        assert client.post(PATH, json={**GREEDY, "model": "other"}).status_code == 200
        answered = time.monotonic() - begun
        for thread, _ in chats:
            thread.join()
        whole = time.monotonic() - begun
        assert client.post(PATH, json=GREEDY).status_code == 200
        until(lambda: not client.get("/healthz").json()["running"])
        health = client.get("/healthz").json()
    for _, (reply,) in chats:
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "messages")
        assert error["code"] == "prompt_unreadable"
        words = "The base's chat template or tokenizer failed: it took too much time or memory."
        assert error["message"] == words
    assert health == {"status": "ok", "waiting": 0, "running": 0, "reading": 0}
    assert template == SLOW["doubled"] or answered < whole


def test_the_server_stops_at_once_beside_a_template_that_takes_for_ever(pool_of):
    app = two_bases(pool_of, SLOW["power"])
    with client_of(app) as client:
        thread, found = in_a_thread(client.post, CHATS, json=CHAT)
        until(lambda: client.get("/healthz").json()["reading"])
        begun = time.monotonic()
        client.portal.call(app.state.service.close)
        thread.join(30)
        assert time.monotonic() - begun < untrusted_text.SECONDS
    assert found[0].status_code == 503
    assert found[0].json()["error"]["message"] == "The server was stopped."


def test_a_request_that_a_template_outlasts_is_a_504(pool):
    app = app_of(pool, Serving(timeout=1), template=SLOW["loop"])
    with client_of(app) as client:
        late = error_of(client, 504, CHATS, **CHAT)
        assert late["message"] == "The answer took longer than 1 seconds."
        until(lambda: not client.get("/healthz").json()["reading"])
        assert client.post(PATH, json=GREEDY).status_code == 200


@pytest.mark.parametrize("problem", ["no processes", "no python"])
def test_a_process_that_cannot_be_started_is_the_server_s_fault(client, app, monkeypatch, problem):
    def fails(*_, **__):
        raise OSError("Resource temporarily unavailable")

    (texts,) = (process for process, _ in app.state.service._texts.values())
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
    assert client.post(PATH, json=GREEDY).status_code == 200


def two_bases(pool_of, template):
    """An application of experts of one base, which has `template`, and of another as "other"."""
    from phatgoose.apps.server import ServedModel, create_app

    places = {"goose": pool_of("llama"), "other": pool_of("gpt2")}
    places = {name: str(pool.experts[0].directory.parent) for name, pool in places.items()}
    app = create_app([ServedModel(*each, dtype="float32") for each in places.items()])
    app.state.service.models["goose"].runner.tokenizer.chat_template = template
    return app


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
