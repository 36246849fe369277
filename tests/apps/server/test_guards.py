"""What requests pass before their routes: metrics, hosts, origins, API keys, bodies."""

import json
import socket

import pytest

from phatgoose.apps.server.guards import (
    AT_ONCE,
    AccessControl,
    BodyLimits,
    Metrics,
    RequestBody,
    RequestGuard,
)
from phatgoose.apps.server.protocol import ApiError
from serving import GREEDY, JSON, PATH

MIB = 1 << 20
BODY = json.dumps(GREEDY)
FORM = "application/x-www-form-urlencoded"
EVIL = "http://evil.example"


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("GET", PATH, None, {}, 405, None),
        ("GET", "/nowhere", None, {}, 404, None),
        ("GET", "/v1/models/duck", None, {}, 404, "model_not_found"),
        ("POST", PATH, b"x" * (2 * MIB), {}, 413, "too_large"),
        ("POST", PATH, (b"x" * MIB for _ in range(2)), {}, 413, "too_large"),
        *(
            ("POST", PATH, BODY, {"Content-Type": kind}, 415, None)
            for kind in ("", FORM, "text/json")
        ),
        *(
            ("GET", path, None, {"Host": "evil.example:8000"}, 403, "unknown_host")
            for path in ("/", "/nowhere")
        ),
        *(
            ("POST", PATH, BODY, {"Origin": origin}, 403, "foreign_origin")
            for origin in (EVIL, "null", "http://localhost:81")
        ),
        *(
            ("POST", PATH, BODY, {"Host": host}, 200, None)
            for host in ("LOCALHOST:8000", "127.0.0.1:80", "[::1]:8000", "localhost.")
        ),
        *(
            ("POST", PATH, BODY, {"Content-Type": kind}, 200, None)
            for kind in ("application/json; charset=utf-8", "Application/vnd.api+JSON")
        ),
        ("POST", PATH, BODY, {"Origin": "http://localhost"}, 200, None),
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


def client_of(doors, address="a", key=None, host="localhost"):
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
        assert client_of(AccessControl(hosts), host=host)
    for host in kept_out:
        with pytest.raises(ApiError):
            client_of(AccessControl(hosts), host=host)


def test_clients_are_told_apart_by_key_and_else_by_address():
    keyed = AccessControl(keys=["one", "two"])
    names = [client_of(keyed, address, key) for address in ("a", "b") for key in ("one", "two")]
    assert names[:2] == names[2:]
    assert names[0] != names[1]
    assert not any("one" in name or "two" in name for name in names)
    free = AccessControl()
    assert client_of(free, "10.0.0.1", "x") != client_of(free, "10.0.0.2", "x")
    assert client_of(free, "fd00::1:2") == client_of(free, "fd00::9:9")  # one customer's network
    assert client_of(free, "fd00::1") != client_of(free, "fd00:0:0:1::1")
    assert client_of(free, None) == client_of(free, "unknown")


def test_bodies_are_counted_together_and_let_go():
    gate = RequestGuard(None, AccessControl(), Metrics(), limits=BodyLimits(100))
    *full, another = [RequestBody(gate, None) for _ in range(AT_ONCE + 1)]
    for body in full:
        body.add(b"x" * 100)
    for size, status in ((1, 429), (101, 413)):
        with pytest.raises(ApiError) as refused:
            another.add(b"x" * size)
        assert refused.value.status_code == status
        for body in (*full, another, another):
            body.release()
        assert gate.size == 0
