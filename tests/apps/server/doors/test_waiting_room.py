"""Whoever knocks at the server: what is let in, what it may cost, and who has to wait for whom."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

import serving
from phatgoose.apps.server import served_models
from phatgoose.apps.server.api import request_parsing, service
from phatgoose.apps.server.api.request_parsing import parsed
from phatgoose.apps.server.api.request_schema import ChatRequest, CompletionRequest
from phatgoose.apps.server.api_errors import ApiError, without_paths
from phatgoose.apps.server.engine.loaded_models import LoadedModel
from phatgoose.apps.server.guards import connection_guard, request_guard
from phatgoose.apps.server.guards.access_control import AccessControl, host_of
from phatgoose.apps.server.guards.connection_guard import ConnectionGuard
from phatgoose.apps.server.guards.request_guard import AT_ONCE, RequestBody, RequestGuard
from phatgoose.apps.server.uvicorn_server import _connections
from phatgoose.config import Serving
from phatgoose.errors import ConfigError

MIB = 1 << 20
GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}
JSON = {"Content-Type": "application/json"}
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def pool(pool_of):
    return pool_of("llama")


@pytest.fixture(scope="module")
def app(pool):
    return serving.app_of(pool, Serving(read_timeout=1, max_connections=8, max_routings=3))


@pytest.fixture(scope="module")
def client(app):
    with serving.client_of(app) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(pool):
    with serving.client_of(serving.app_of(pool, api_keys=["secret", "other"])) as client:
        yield client


@pytest.fixture(scope="module")
def address(pool):
    """A server under uvicorn that waits a second for requests and has room for 8 connections."""
    limits = Serving(read_timeout=1, max_connections=8, max_body=100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_guard, "CHECKING", 0.05)
        patch.setattr(request_guard, "DRAINING", 0.05)
        with serving.running(serving.app_of(pool, limits), limits) as address:
            yield address


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


# --- bodies ---------------------------------------------------------------------------------------


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


@contextmanager
def held(monkeypatch, owner, name):
    """A function that waits until it is let go: yields (it was called, let it go on)."""
    called, go_on = threading.Event(), threading.Event()
    original = getattr(owner, name)

    def waits(*arguments, **options):
        called.set()
        assert go_on.wait(30)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, waits)
    try:
        yield called, go_on
    finally:
        go_on.set()
        monkeypatch.setattr(owner, name, original)


def in_a_thread(work, *arguments, **options):
    """(thread, list that its result comes into)"""
    found = []
    thread = threading.Thread(target=lambda: found.append(work(*arguments, **options)))
    thread.start()
    return thread, found


@pytest.mark.parametrize(
    ("owner", "step"), [(service, "parsed"), (service.RequestPreparer, "completion_prompts")]
)
def test_the_server_is_well_while_it_reads_a_request(client, monkeypatch, owner, step):
    with held(monkeypatch, owner, step) as (called, go_on):
        large = {**GREEDY, "user": "x" * 20_000}
        thread, found = in_a_thread(client.post, PATH, json=large)
        assert called.wait(30)
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/models").status_code == 200
        go_on.set()
        thread.join()
    assert found[0].status_code == 200


def test_bodies_are_counted_together_and_let_go():
    gate = RequestGuard(None, AccessControl(), 100, 1)
    full = [RequestBody(gate, None) for _ in range(AT_ONCE)]
    for body in full:
        body.add(b"x" * 100)
    another = RequestBody(gate, None)
    with pytest.raises(ApiError) as refused:
        another.add(b"x")
    assert refused.value.status_code == 429
    for body in (*full, another, another):
        body.release()
    assert gate.held == 0
    with pytest.raises(ApiError) as refused:
        another.add(b"x" * 101)
    assert refused.value.status_code == 413


def test_bodies_are_let_go_whatever_became_of_the_request(client, app):
    gates = []
    layer = app.middleware_stack
    while layer is not None:
        gates += [layer] if isinstance(layer, RequestGuard) else []
        layer = getattr(layer, "app", getattr(layer, "_app", None))
    for body in (GREEDY, {**GREEDY, "model": "duck"}, {"x": 1}):
        client.post(PATH, json=body)
    client.post(PATH, content=b"{}" * MIB, headers=JSON)
    assert gates[0].held == 0


# --- keys, hosts, pages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "content", "headers"),
    [
        ("POST", PATH, b"{", JSON),
        ("POST", PATH, b"[" * 100_000, JSON),
        ("POST", PATH, b"{}", {}),
        ("POST", PATH, b"x" * (2 * MIB), JSON),
        ("POST", "/v1/chat/completions", b"{}", JSON),
        ("GET", "/v1/models", None, {}),
        ("GET", "/v1/models/duck", None, {}),
        ("GET", "/metrics", None, {}),
        ("GET", "/nowhere", None, {}),
        ("DELETE", PATH, None, {}),
        ("POST", "/", b"{", JSON),
    ],
    ids=str,
)
def test_the_key_is_asked_for_before_anything_else(guarded, method, path, content, headers):
    if path == "/":  # open: whatever is said there is nothing to guard
        assert guarded.request(method, path, content=content, headers=headers).status_code == 405
        return
    for key in (None, "Bearer wrong", "Basic secret", "Bearer", "Bearer \xe9"):
        given = {**headers, **({"Authorization": key.encode("latin-1")} if key else {})}
        reply = guarded.request(method, path, content=content, headers=given)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
    given = {**headers, "Authorization": "bearer other"}
    assert guarded.request(method, path, content=content, headers=given).status_code != 401


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json"],
)
def test_a_body_that_does_not_say_that_it_is_json_is_refused(client, kind):
    headers = {"Content-Type": kind} if kind else {}
    reply = client.post(PATH, content=json.dumps(GREEDY), headers=headers)
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/vnd.api+JSON"])
def test_other_ways_to_say_json_are_understood(client, kind):
    reply = client.post(PATH, content=json.dumps(GREEDY), headers={"Content-Type": kind})
    assert reply.status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/openapi.json", "/nowhere"])
def test_a_name_that_is_not_the_server_s_is_refused(client, path):
    assert client.get(path, headers={"Host": "evil.example"}).status_code == 403
    assert client.get(path, headers={"Host": "evil.example:8000"}).status_code == 403
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]:8000", "localhost."):
        assert client.get(path, headers={"Host": host}).status_code != 403


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
    def known(host):
        headers = [(b"host", host.encode())]
        try:
            AccessControl(hosts).check(
                {"headers": headers, "method": "GET", "path": "/", "client": None}
            )
        except ApiError:
            return False
        return True

    assert all(map(known, let_in))
    assert not any(map(known, kept_out))


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:81", "file:"])
def test_pages_of_others_may_not_use_the_server(client, origin):
    headers = {**JSON, "Origin": origin}
    reply = client.post(PATH, json=GREEDY, headers=headers)
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "foreign_origin"
    own = {**JSON, "Origin": "http://localhost"}
    assert client.post(PATH, json=GREEDY, headers=own).status_code == 200
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_clients_are_told_apart_by_key_and_else_by_address():
    def client_of(doors, address, key=None):
        headers = [(b"host", b"localhost")]
        headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"headers": headers, "method": "GET", "path": "/v1/models"}
        return doors.check({**scope, "client": address and (address, 1)})

    keyed = AccessControl(keys=["one", "two"])
    names = [client_of(keyed, address, key) for address in ("a", "b") for key in ("one", "two")]
    assert names[:2] == names[2:]
    assert names[0] != names[1]
    assert not any("one" in name or "two" in name for name in names)
    with pytest.raises(ApiError):
        client_of(keyed, "a", "three")
    free = AccessControl()
    assert client_of(free, "10.0.0.1", "x") != client_of(free, "10.0.0.2", "x")
    assert client_of(free, "fd00::1:2") == client_of(free, "fd00::9:9")  # one customer's network
    assert client_of(free, "fd00::1") != client_of(free, "fd00:0:0:1::1")
    assert client_of(free, None) == client_of(free, "unknown")


def test_hosts_are_read_with_and_without_a_port():
    written = ["A.b:80", "[::1]:80", "::1", "a.b.", " 1.2.3.4 "]
    assert list(map(host_of, written)) == ["a.b", "::1", "::1", "a.b", "1.2.3.4"]


# --- what is told ---------------------------------------------------------------------------------


def test_no_local_path_is_told(client, pool, app, monkeypatch):
    assert "/" in pool.base.id
    cards = client.get("/v1/models").json()["data"]
    assert {card["base"] for card in cards} == {pool.base.id.rpartition("/")[2]}
    reply = client.post(PATH, json={**GREEDY, "router": "retrieval"}).json()
    assert "embeddings" in reply["error"]["message"]
    assert str(serving.folder_of(pool)) not in str(reply)
    assert "/tmp" not in str(reply)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/home/me/experts/e0 has no gates.", "e0 has no gates."),
        ("'/home/me/my experts/e0': broken.", "'e0': broken."),
        ("experts/e0 has no gates, nor /a/b and /c/d.", "experts/e0 has no gates, nor b and d."),
        (r"C:\Users\me\e0: broken, ~/x/y too", "e0: broken, y too"),
        ("hub:me/x@v1 or https://a.example/x, 1/2 or m/s", None),
        ("use /v1", "use v1"),
    ],
)
def test_paths_in_messages_are_cut(message, told):
    assert without_paths(message) == (message if told is None else told)


@pytest.mark.parametrize("place", ["a/b\x1b[31m", "x\ny=experts", "x\u202ey=experts"])
def test_models_have_names_that_can_be_shown(place):
    with pytest.raises(ConfigError, match="NAME=PLACE"):
        served_models([place])


# --- connections ----------------------------------------------------------------------------------


def opened(address):
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


@contextmanager
def closed_at_the_end(sockets):
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


CHUNKED = b"Transfer-Encoding: chunked"


def said(sock):
    """All that comes until the other side closes."""
    pieces = []
    while True:
        try:
            piece = sock.recv(1 << 16)
        except ConnectionResetError:
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces)


def head(length, *more):
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def test_half_a_request_is_not_waited_for_for_ever(address):
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    beginnings = [b"", b"GET /v1/mod", b"GET / HTTP/1.1\r\nHost: localhost\r\nX"]
    with closed_at_the_end([opened(address) for _ in range(5)]) as socks:
        for sock, begun in zip(socks, beginnings, strict=False):
            sock.sendall(begun)
        socks[3].sendall(whole)  # and half a second request
        assert b"200" in socks[3].recv(1 << 16)
        socks[3].sendall(whole[:9])
        socks[4].sendall(head(100) + b'{"model"')
        assert [said(sock) for sock in socks[:4]] == [b""] * 4
        answer = said(socks[4])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 1 seconds" in answer


def test_a_client_that_goes_away_while_it_sends_is_forgotten(address, capfd):
    with opened(address) as sock:
        sock.sendall(head(100) + b'{"model"')
    with opened(address) as sock:  # the server has seen it by the time it answers this
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert said(sock).startswith(b"HTTP/1.1 200 ")
    assert capfd.readouterr().err == ""


def test_those_who_wait_make_room_for_those_who_ask(address):
    with closed_at_the_end([opened(address) for _ in range(30)]) as waiting:
        for _ in range(3):
            with opened(address) as sock:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert [said(sock) for sock in waiting[:20]] == [b""] * 20


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
        b"GET /" + b"x" * 200_000,
        head(0).replace(b"Content-Length: 0", CHUNKED) + b"1\r\nx\r\n" * 9**5,
        head(0).replace(b"Content-Length: 0", CHUNKED) + (b"1;" + b"x" * 999 + b"\r\nx\r\n") * 999,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED + b"\r\n\r\n" + b"1\r\nx\r\n" * 9**5,
        head(300_000) + b"x" * 300_000,
    ],
    ids=["header", "path", "chunks", "names", "unwanted", "body"],
)
def test_more_than_a_request_may_have_ends_the_connection(address, sent):
    with opened(address) as sock:
        try:
            sock.sendall(sent)
        except OSError:
            return  # cut off while it was sending
        answer = said(sock)
    assert answer[:10] in (b"", b"HTTP/1.1 4") or sent.startswith(b"GET / ")


def test_a_body_in_chunks_is_read(address):
    body = json.dumps({**GREEDY, "user": "x" * 50_000}).encode()
    pieces = [body[begin : begin + 64] for begin in range(0, len(body), 64)]
    start = head(0, "Connection: close").replace(b"Content-Length: 0", CHUNKED)
    with opened(address) as sock:
        sock.sendall(start + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n")
        assert said(sock).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_is_somewhat_too_large_is_told_so(address):
    for content in (head(150_000), head(0).replace(b"Content-Length: 0", b"X: 1")):
        with opened(address) as sock:
            sock.sendall(content + b"x" * 150_000)
            assert said(sock).startswith(b"HTTP/1.1 4")


def test_strangers_write_nothing_into_the_log(address, capfd):
    sent = [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade, close\r\n"
        b"Upgrade: websocket\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: "
        + b"9" * 5000
        + b"\r\n\r\n",
        head("\u0661"),
        head("9" * 18) + b"{}",
    ]
    for content in sent:
        with opened(address) as sock:
            sock.sendall(content)
            answer = said(sock)
        assert b" 5" not in answer[:13]
    assert capfd.readouterr().err == ""


def test_no_more_connections_are_wanted_than_files_may_be_opened(monkeypatch):
    limits = [(1024, 1024)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, value: limits.append(value))
    assert 300 < _connections(1000) < 1000
    limits.append((1024, 4096))
    assert _connections(1000) == 1000
    assert 1000 < limits[-1][0] < 4096
    limits.append((-1, -1))
    assert _connections(1000) == 1000


async def nobody(scope, receive, send):
    """An application that never answers."""
    await asyncio.sleep(1000)


class FakeTransport:
    """A connection whose other side does nothing."""

    def __init__(self):
        self.aborted = self.closed = False
        self.written = b""

    def get_extra_info(self, name, default=None):
        return default

    def is_closing(self):
        return self.closed

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = self.aborted = True

    def pause_reading(self):
        pass

    resume_reading = pause_reading


def test_small_answers_leave_at_once():
    """TCP_NODELAY, which asyncio doesn't set for sockets as `socket.create_server` makes them."""

    async def connect(sock):
        transport = FakeTransport()
        transport.get_extra_info = {"socket": sock}.get
        server = serving.server_of(nobody, Serving())
        options = {"config": server.config, "server_state": server.server_state, "app_state": {}}
        connection = ConnectionGuard(3, 1000).protocol(**options)
        connection.connection_made(transport)
        connection.connection_lost(None)

    with socket.socket() as sock:
        asyncio.run(connect(sock))
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_who_reads_nothing_is_cut_off_and_who_is_answered_is_not(monkeypatch):
    asyncio.run(look_at_connections(monkeypatch))


async def look_at_connections(monkeypatch):
    monkeypatch.setattr(connection_guard, "WRITING", 0.0)
    server = serving.server_of(nobody, Serving())
    all_of_them = ConnectionGuard(3, 1000)
    options = {"config": server.config, "server_state": server.server_state, "app_state": {}}

    def connected():
        connection, transport = all_of_them.protocol(**options), FakeTransport()
        connection.connection_made(transport)
        return connection, transport

    pairs = [connected() for _ in range(3)]
    for connection, _ in pairs:
        connection.data_received(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    refused, transport = connected()  # all others are being answered
    assert transport.written.startswith(b"HTTP/1.1 503 ")
    assert [t.closed for _, t in pairs] == [False] * 3
    pairs[0][0].pause_writing()
    pairs[1][1].close()
    loop = asyncio.get_running_loop()
    for _ in range(2):
        all_of_them._check(loop)
        await asyncio.sleep(0.01)
    assert [t.aborted for _, t in pairs] == [True, True, False]
    assert transport.aborted
    for connection, _ in [*pairs, (refused, transport)]:
        connection.connection_lost(None)
    assert len(all_of_them) == 0
    tasks = list(server.server_state.tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- routings -------------------------------------------------------------------------------------


def test_others_are_served_while_a_routing_is_composed(guarded, monkeypatch):
    """Its own client may have two on their way, all of them so many; what is there goes on."""
    routings = guarded.app.state.service.routings

    def ask(key, **change):
        headers = {"Authorization": f"Bearer {key}"}
        return guarded.post(PATH, json={**GREEDY, **change}, headers=headers)

    with held(monkeypatch, LoadedModel, "compose") as (called, go_on):
        begun = [in_a_thread(ask, "secret", k=k) for k in (1, 1, 3)]
        assert called.wait(30)
        serving.until(lambda: routings.unfinished == 2)
        assert ask("other").status_code == 200
        assert ask("secret").status_code == 200
        refused = ask("secret", k=4)
        assert refused.status_code == 429
        assert "Retry-After" in refused.headers
        go_on.set()
        for thread, found in begun:
            thread.join()
            assert found[0].status_code == 200
    assert ask("secret", k=4).status_code == 200
    serving.until(lambda: routings.requests == 0)
    assert len(routings.composed) == 3


def test_a_routing_that_takes_too_long_is_not_waited_for(pool, monkeypatch):
    app = serving.app_of(pool, Serving(timeout=1))
    routings = app.state.service.routings
    with serving.client_of(app) as client:
        with held(monkeypatch, LoadedModel, "compose") as (_, go_on):
            reply = client.post(PATH, json={**GREEDY, "k": 1})
            assert reply.status_code == 504
            assert client.post(PATH, json=GREEDY).status_code == 200
            go_on.set()
        serving.until(lambda: routings.composed and not routings.unfinished)
        serving.until(lambda: routings.requests == 0)
        assert client.post(PATH, json={**GREEDY, "k": 1}).status_code == 200


def test_a_routing_that_fails_fails_for_all_who_wait(client, app, monkeypatch):
    routings = app.state.service.routings
    before = len(routings.composed)

    def fails(*_):
        raise ConfigError("nothing at /home/me/experts")

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "compose", fails)
        reply = client.post(PATH, json={**GREEDY, "k": 1})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "nothing at experts"
    assert (len(routings.composed), routings.unfinished) == (before, 0)
    assert client.post(PATH, json={**GREEDY, "k": 1}).status_code == 200
