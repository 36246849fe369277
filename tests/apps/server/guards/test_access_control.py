"""The guard of hosts, origins and API keys."""

from __future__ import annotations

import socket

import pytest

import serving
from phatgoose.apps.server import connections as connection_guard
from phatgoose.apps.server import guards as request_guard
from phatgoose.apps.server.guards import AccessControl, host_of
from phatgoose.apps.server.protocol import ApiError
from phatgoose.config import Serving

MIB = 1 << 20


GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}


JSON = {"Content-Type": "application/json"}


PATH = "/v1/completions"


@pytest.fixture(scope="module")
def address(pool):
    """A server under uvicorn that waits a second for requests and has room for 8 connections."""
    limits = Serving(read_timeout=1, max_connections=8, max_body=100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_guard, "CHECKING", 0.05)
        patch.setattr(request_guard, "DRAINING", 0.05)
        with serving.running(serving.app_of(pool, limits), limits) as address:
            yield address


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
