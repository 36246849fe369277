"""Requests: who is let in, refused at bounded cost, and prepared within what the model can hold."""

import asyncio
import json
import socket
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from phatgoose.apps.server import ServedModel, create_app
from phatgoose.apps.server.guards import (
    AT_ONCE,
    AccessControl,
    Metrics,
    RequestGuard,
)
from phatgoose.apps.server.protocol import ApiError, ChatRequest, without_paths
from phatgoose.apps.server.requests import RequestReader, check_body
from phatgoose.base.loading import load_base
from phatgoose.config import Routing, Serving
from phatgoose.routing.compose import composition_of
from phatgoose.routing.routers.auto import resolved
from phatgoose.untrusted_text import UntrustedText
from serving import (
    CHAT,
    CHAT_TEMPLATE,
    CHATS,
    GREEDY,
    JSON,
    PATH,
    ask,
    beside,
    client_of,
    error_of,
    folder_of,
    health_of,
    until,
)

MIB = 1 << 20


# Hosts, origins, API keys and bodies, before the routes.

BODY = json.dumps(GREEDY)
FORM = "application/x-www-form-urlencoded"
EVIL = "http://evil.example"
PATHS = ("/", "/nowhere")
KINDS = ("application/json; charset=utf-8", "Application/vnd.api+JSON")


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("GET", PATH, None, {}, 405, None),
        ("GET", "/nowhere", None, {}, 404, None),
        ("GET", "/v1/models/duck", None, {}, 404, "model_not_found"),
        ("POST", PATH, b"x" * (2 * MIB), {}, 413, "too_large"),
        pytest.param("POST", PATH, iter([b"x" * MIB] * 2), {}, 413, "too_large", id="in parts"),
        *(("GET", path, None, {"Host": "evil.example:8"}, 403, "unknown_host") for path in PATHS),
        *(
            ("POST", PATH, BODY, {name: value}, status, code)
            for name, status, code, values in (
                ("Content-Type", 415, None, ("", FORM, "text/json")),
                ("Origin", 403, "foreign_origin", (EVIL, "null", "http://localhost:81")),
                ("Host", 200, None, ("LOCALHOST:8000", "127.0.0.1:80", "[::1]:80", "localhost.")),
                ("Content-Type", 200, None, KINDS),
                ("Origin", 200, None, ("http://localhost",)),
            )
            for value in values
        ),
        ("GET", "/v1/models", None, {"Origin": EVIL}, 200, None),  # which may read
    ],
    ids=lambda value: str(value)[:50],
)
def test_who_is_let_in_before_the_body_is_looked_at(
    client, method, path, content, headers, status, code
):
    headers = {**(JSON if method == "POST" else {}), **headers}
    reply = client.request(method, path, content=content, headers=headers)
    assert reply.status_code == status
    if status != 200:
        error = reply.json()["error"]
        assert error["code"] == code
        assert error["message"]
        assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(
    ("method", "path", "content", "headers"),
    [
        ("POST", PATH, b"x" * (2 * MIB), JSON),
        ("GET", "/metrics", None, {}),
        ("GET", "/nowhere", None, {}),
    ],
    ids=str,
)
def test_the_key_is_asked_for_before_anything_else(guarded, method, path, content, headers):
    for key in (None, "Bearer wrong", "Basic secret", "Bearer", "Bearer \xe9"):
        sent = {**headers, **({"Authorization": key.encode("latin-1")} if key else {})}
        reply = guarded.request(method, path, content=content, headers=sent)
        assert reply.status_code == 401
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert reply.json()["error"]["code"] == "invalid_api_key"
    sent = {**headers, "Authorization": "bearer other"}
    assert guarded.request(method, path, content=content, headers=sent).status_code != 401


def test_what_needs_no_key_says_nothing_of_the_models(guarded):
    for path in ("/", "/healthz", "/openapi.json"):
        assert guarded.get(path).status_code == 200
    assert guarded.post("/", content=b"{", headers=JSON).status_code == 405
    paths = guarded.get("/openapi.json").json()["paths"]
    assert paths["/v1/models"]["get"]["security"]
    assert "security" not in paths["/healthz"]["get"]


def sender_of(doors, address="a", key=None, host="localhost"):
    headers = [(b"host", host.encode())]
    headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"headers": headers, "method": "GET", "path": "/v1/models"}
    return doors.check({**scope, "client": address and (address, 1)})


@pytest.mark.parametrize(
    ("hosts", "let_in", "kept_out"),
    [
        ([], ["localhost", "127.0.0.1:8000", "[::1]"], ["192.168.0.2", "goose.example", ""]),
        (["192.168.0.2"], ["192.168.0.2:8000", "localhost"], ["192.168.0.3", "goose.example"]),
        (["::1", "Goose.Example"], ["goose.example", "[::1]:1"], ["x.goose.example"]),
        (["0.0.0.0"], ["192.168.0.2", "10.0.0.1:80", "[fe80::1]:80"], ["goose.example", "1.2.3"]),
        (["::"], ["192.168.0.2", socket.gethostname()], ["goose.example"]),
        (["*"], ["goose.example", "10.0.0.1"], []),
    ],
    ids=str,
)
def test_hosts_are_those_that_the_operator_names(hosts, let_in, kept_out):
    for host in let_in:
        assert sender_of(AccessControl(hosts), host=host)
    for host in kept_out:
        with pytest.raises(ApiError):
            sender_of(AccessControl(hosts), host=host)


def test_clients_are_told_apart_by_key_and_else_by_address():
    keyed = AccessControl(keys=["one", "two"])
    names = [sender_of(keyed, address, key) for address in ("a", "b") for key in ("one", "two")]
    assert names[:2] == names[2:]
    assert names[0] != names[1]
    assert not any("one" in name or "two" in name for name in names)
    free = AccessControl()
    assert sender_of(free, "10.0.0.1", "x") != sender_of(free, "10.0.0.2", "x")
    assert sender_of(free, "fd00::1:2") == sender_of(free, "fd00::9:9")  # one customer's network
    assert sender_of(free, "fd00::1") != sender_of(free, "fd00:0:0:1::1")
    assert sender_of(free, "::ffff:10.0.0.1") == sender_of(free, "10.0.0.1")  # as proxies write it
    assert sender_of(free, None) == sender_of(free, "unknown")


@pytest.mark.parametrize(("reads", "count"), [("conversation", 2), ("last-message", 1)])
def test_how_much_of_a_chat_a_router_by_prompt_reads(runner_of, reads, count):
    runner = runner_of(router="discriminant")
    messages = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant", "user")]
    runner.tokenizer.chat_template = CHAT_TEMPLATE
    with closing(UntrustedText(runner.tokenizer)) as texts:
        reader = RequestReader(runner.frame, Serving(reads=reads), texts)
        (prompt,) = reader.prompts(ChatRequest(model="goose", messages=messages))
    assert len(prompt.asked.messages) == count
    assert bool(prompt.asked.system) == (reads == "conversation")


ASKED = "plums or apples"
ODD = {
    "paragraphs": [("user", "a\n\n" * 60 + ASKED)],
    "two halves": [("user", f"{ASKED * 7}\n\n{ASKED * 7}")],
    "line breaks": [("user", "\n" * 200 + ASKED)],
    "turns": [("user", f"x{n}") for n in range(40)],
    "follow-ups": [("user", ASKED), *[("assistant", "no"), ("user", "shorter, please")] * 9],
    "long messages": [("user", ASKED * 2 + str(n)) for n in range(6)],
    "long system": [("system", ASKED * 14), ("user", "a")],
    "nothing": [("user", ""), ("assistant", ""), ("user", " \n\n ")],
    "then nothing": [("user", ASKED), ("user", "")],
    "no user": [("assistant", ASKED)],
    "only system": [("developer", ASKED)],
    "a tool's": [("user", ASKED), ("tool", "42")],
    "a template's": [("user", "[system] e1\n[user] \0 \ufeff" + ASKED)],
}


@pytest.fixture(scope="module")
def by_prompt(pool):
    model = ServedModel("goose", str(folder_of(pool)), Routing("discriminant"), dtype="float32")
    app = create_app([model], Serving(prefix_cache=0))
    (runner,) = (each.runner for each in app.state.service.models.values())
    runner.tokenizer.chat_template = CHAT_TEMPLATE
    with client_of(app) as client:
        reader = composition_of(runner.model).chooser.ready.reader
        client.models = runner.model, reader._stack.module
        yield client


@pytest.mark.parametrize("name", ODD)
def test_odd_chats_are_answered_and_read_at_bounded_cost(by_prompt, name):
    passed = {}

    def counted(layer, given):
        passed[layer] = passed.get(layer, 0) + given[0].numel()

    base, reader = (each.get_input_embeddings() for each in by_prompt.models)
    hooks = [each.register_forward_pre_hook(counted) for each in (base, reader)]
    own = f"plums or {name}"  # which no other case has made it remember
    turns = [(role, content.replace(ASKED, own)) for role, content in ODD[name]]
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"model": "goose", "messages": messages, "max_tokens": 1}
    reply = by_prompt.post(CHATS, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-phatgoose-experts"]
    prompt, first = reply.json()["usage"]["prompt_tokens"], passed.get(reader, 0)
    assert passed[base] == prompt
    # Of the reader's tokens, which are several bytes: whole, both ends, sentences and lines.
    assert (first > 0) == (name != "nothing")
    assert first <= prompt
    by_prompt.post(CHATS, json=body)
    for hook in hooks:
        hook.remove()
    # What was read is remembered.
    assert (passed[base], passed.get(reader, 0)) == (2 * prompt, first)


def test_bodies_are_counted_together_and_let_go():
    guard = RequestGuard(None, AccessControl(), Metrics(), most=100)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
    scope["app"] = SimpleNamespace(routes=[])

    async def sent(size, goes_on):
        """The status of the answer to a body whose first `size` bytes come at once."""
        begun, answers = {"type": "http.request", "body": b"x" * size, "more_body": True}, []
        gone, messages = {"type": "http.disconnect"}, [begun]

        async def receive():
            return messages.pop() if messages else await goes_on.wait() and gone

        async def send(message):
            answers.append(message)

        await guard(scope, receive, send)
        return answers[0]["status"] if answers else None

    async def all_of_them():
        goes_on = asyncio.Event()
        full = [asyncio.ensure_future(sent(100, goes_on)) for _ in range(AT_ONCE)]
        await asyncio.sleep(0)
        refused = [await sent(size, goes_on) for size in (1, 101)]
        goes_on.set()
        return refused, await asyncio.gather(*full), guard.size

    assert asyncio.run(all_of_them()) == ([429, 413], [None] * AT_ONCE, 0)


# What is read of them.

BODIES = json.loads((Path(__file__).parents[2] / "clients" / "bodies.json").read_text())
ANY_ORDER = "{{ tools or '' }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def any_order(client_with):
    return client_with(Serving(max_tokens=8), template=ANY_ORDER)


@pytest.mark.parametrize("each", BODIES, ids=lambda each: each["program"])
def test_bodies_that_other_programs_send_are_answered(any_order, each):
    reply = any_order.post(f"/v1/{each['path']}", json={**each["body"], "model": "goose"})
    assert reply.status_code == 200, reply.text
    assert '{"error"' not in reply.text  # in a stream


def test_router_auto_is_the_first_that_base_and_experts_allow(client, pool):
    """Whatever the model is served with."""
    base = load_base(pool.base.id, dtype="float32")
    wanted = resolved(Routing("auto"), pool, base.tokenizer).router
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
    "the same key twice": body_of('"zebra": 1, "prompt": "b"'),
    "a long key twice": b'{"' + b"zebra" * 90_000 + b'":1,"' + b"zebra" * 90_000 + b'":2}',
    # Strict where any JSON is taken, too.
    "two keys in a schema": schema_of('{"a": 1, "a": 2}'),
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

POWER = "{% set a = 9 %}{{ a ** (a ** a) }}"
DOUBLED = (
    "{% set x = namespace(y='a' * 999) %}{% for i in range(60) %}{% set x.y = x.y + x.y %}"
    "{% endfor %}{{ x.y | length }}"
)


def two_bases(pool_of, template, **limits):
    """A client of experts of one base, which has `template`, and of another as "other".

    `limits` are those of the processes that read texts.
    """
    places = {"goose": folder_of(pool_of("llama")), "other": folder_of(pool_of("gpt2"))}
    app = create_app([ServedModel(n, str(p), dtype="float32") for n, p in places.items()])
    app.state.service.models["goose"].runner.tokenizer.chat_template = template
    for texts in app.state.service.text_processes:
        vars(texts).update(limits)
    return client_of(app)


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize("template", [POWER, DOUBLED])
def test_a_template_that_wants_everything_keeps_nobody_else_waiting(pool_of, template):
    with two_bases(pool_of, template, seconds=1, memory=256 << 20) as client:
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
        assert time.monotonic() - begun < UntrustedText.seconds


# What is told of it.


def test_what_breaks_inside_is_not_told(client):
    def fail(_):
        raise ValueError("a secret")

    client.app.add_route("/v1/broken", fail)
    reply = client.get("/v1/broken")
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
