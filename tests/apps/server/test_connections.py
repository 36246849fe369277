"""The server as a process, and its connections: half requests, crowds, unread answers."""

import asyncio
import atexit
import http.client
import json
import multiprocessing
import os
import socket
import sys
import time
import urllib.error
import urllib.request
import warnings
from contextlib import ExitStack, contextmanager
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest

import serving
from phatgoose.apps.cli import main
from phatgoose.apps.console import say
from phatgoose.apps.server import connections, guards, run
from phatgoose.apps.server.connections import ConnectionGuard, GuardedConnection
from phatgoose.apps.server.engine import Batch
from phatgoose.config import Serving
from phatgoose.errors import ConfigError
from serving import GREEDY, JSON, PATH

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSING = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
CHUNKED = b"Transfer-Encoding: chunked"
LONG = {**GREEDY, "max_tokens": 1000, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def address(pool):
    """A server under uvicorn that waits a second for requests and has room for 8 connections."""
    limits = Serving(read_timeout=1, max_connections=8, max_body=100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "CHECKING", 0.05)
        patch.setattr(guards, "DRAINING", 0.05)
        with serving.running(serving.app_of(pool, limits), limits) as address:
            yield address


def opened(address):
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


@contextmanager
def closed_at_the_end(sockets):
    with ExitStack() as stack:
        yield [stack.enter_context(sock) for sock in sockets]


def said(sock):
    """All that comes until the other side closes."""
    pieces = [b" "]
    while pieces[-1]:
        try:
            pieces.append(sock.recv(1 << 16))
        except ConnectionResetError:
            break
    return b"".join(pieces[1:])


def answered(sock):
    """One answer in JSON, whose connection stays open; its body may come by itself."""
    answer = b""
    while not answer.endswith(b"}"):
        piece = sock.recv(1 << 16)
        assert piece, answer
        answer += piece
    return answer


def head(length, *more):
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def test_half_a_request_is_not_waited_for_for_ever(address):
    beginnings = [b"", b"GET /v1/mod", b"GET / HTTP/1.1\r\nHost: localhost\r\nX"]
    with closed_at_the_end([opened(address) for _ in range(5)]) as socks:
        for sock, begun in zip(socks, beginnings, strict=False):
            sock.sendall(begun)
        socks[3].sendall(HEALTH)  # and half a second request
        assert b"200" in answered(socks[3])
        socks[3].sendall(HEALTH[:9])
        socks[4].sendall(head(100) + b'{"model"')
        assert [said(sock) for sock in socks[:4]] == [b""] * 4
        answer = said(socks[4])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 1 seconds" in answer


def test_a_client_that_goes_away_while_it_sends_is_forgotten(address, capfd):
    with opened(address) as sock:
        sock.sendall(head(100) + b'{"model"')
    with opened(address) as sock:  # the server has seen it by the time it answers this
        sock.sendall(CLOSING)
        assert said(sock).startswith(b"HTTP/1.1 200 ")
    assert capfd.readouterr().err == ""


def test_those_who_wait_make_room_for_those_who_ask(address):
    with closed_at_the_end([opened(address) for _ in range(30)]) as waiting:
        for _ in range(3):
            with opened(address) as sock:
                sock.sendall(HEALTH)
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


async def nobody(scope, receive, send):
    """An application that never answers."""
    await asyncio.sleep(1000)


def test_small_answers_leave_at_once():
    """TCP_NODELAY, which asyncio doesn't set for sockets as `socket.create_server` makes them."""
    server = serving.server_of(nobody, Serving())
    options = {"config": server.config, "server_state": server.server_state, "app_state": {}}

    async def leave(sock):
        connection = GuardedConnection(ConnectionGuard(3, 1000), **options)
        connection.connection_made(MagicMock(get_extra_info={"socket": sock}.get))
        connection.connection_lost(None)

    with socket.socket() as sock:
        asyncio.run(leave(sock))
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@contextmanager
def unread(address, number):
    """So many clients that ask for a long stream and read nothing of it."""
    parts = urlsplit(address)
    body = json.dumps(LONG).encode()
    with closed_at_the_end([socket.socket() for _ in range(number)]) as socks:
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((parts.hostname, parts.port))
            sock.sendall(head(len(body)) + body)
        yield socks


@contextmanager
def patient_for(pool, monkeypatch, **seconds):
    """(address, engine) of a server whose guard has these times instead of the docs'."""
    for name, value in {"CHECKING": 0.05, **seconds}.items():
        monkeypatch.setattr(connections, name, value)
    app = serving.app_of(pool, Serving(max_tokens=1000, read_timeout=60))
    with serving.running(app) as address:
        yield address, app.state.service.engine


def test_a_stream_that_nobody_reads_is_cut_off_and_frees_its_place(pool, monkeypatch):
    server = patient_for(pool, monkeypatch, WRITING=0.5)
    with server as (address, engine), serving.held(500) as released, unread(address, 1) as (sock,):
        serving.until(lambda: engine.running == 1)
        (sequence,) = engine._running()
        serving.until(lambda: sequence.is_cancelled)
        released.set()
        serving.until(lambda: engine.running == 0)
        assert len(sequence.generated) < 1000
        assert b"[DONE]" not in said(sock)


def test_who_comes_while_all_connections_are_being_answered_is_told(pool):
    limits = Serving(max_connections=2, max_tokens=1000)
    app = serving.app_of(pool, limits)
    engine = app.state.service.engine
    with serving.running(app, limits) as address, serving.held(), unread(address, 2):
        serving.until(lambda: engine.running + engine.waiting == 2)
        with opened(address) as sock:
            assert said(sock).startswith(b"HTTP/1.1 503 ")


def test_streams_that_nobody_reads_make_room_for_who_waits(pool, monkeypatch):
    """Beside 20 of them from one address a short answer waits for no other to end."""
    steps, step = [], Batch.step

    def slow(batch):
        steps.append(len(batch.sequences))
        time.sleep(0.004)
        step(batch)

    monkeypatch.setattr(Batch, "step", slow)
    body = json.dumps(GREEDY).encode()
    with patient_for(pool, monkeypatch, HURRIED=0.1) as (address, engine), unread(address, 20):
        serving.until(lambda: engine.waiting and engine.running)
        with opened(address) as sock:
            sock.sendall(head(len(body), "Connection: close") + body)
            assert said(sock).startswith(b"HTTP/1.1 200 ")
        number = len(steps)
    assert max(steps) >= 10
    assert number < 1000


# The process.


@contextmanager
def taken_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def command(words: list[str], stderr: int) -> None:
    """What a process does whose command line is `words`."""
    os.environ["PHATGOOSE_API_KEYS"] = "k1,k2"
    os.dup2(stderr, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    atexit._clear()  # of the process that this is a fork of
    atexit.register(say, "left", err=True)  # which multiprocessing wouldn't call
    warnings.simplefilter("default")
    main(words)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_command_serves_and_ends_in_peace(pool):
    """One process: it answers, and on SIGTERM finishes what it has begun and exits with 0."""
    with taken_port() as port:
        pass  # and free again
    words = ["serve", str(serving.folder_of(pool)), "--port", str(port), "--dtype", "float32"]
    words += ["--max-tokens", "200", "--allow-host", "goose.example"]
    stderr, written = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=command, args=(words, written))
    process.start()
    os.close(written)
    try:
        body = {"model": "experts", "prompt": "a", "max_tokens": 200, "stream": True}
        with os.fdopen(stderr) as told:  # written when the models are open
            assert told.readline() == f"serving experts at http://127.0.0.1:{port}\n"
            reply = posted(f"http://127.0.0.1:{port}", body)
            for host, status in (("goose.example", 200), ("evil.example", 403)):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("GET", "/healthz", headers={"Host": host})
                assert connection.getresponse().status == status
                connection.close()
            first = reply.readline()
            process.terminate()
            lines = [first, *reply.read().splitlines()]
            assert b"data: [DONE]" in lines
            assert told.read().endswith("left\n")  # at once, whatever its threads are at
            process.join(60)
            assert process.exitcode == 0
    finally:
        process.kill()


def posted(address, body):
    """The server's reply to `body`, which may begin to listen a moment later."""
    headers = {**JSON, "Authorization": "Bearer k2"}
    content = json.dumps(body).encode()
    request = urllib.request.Request(address + PATH, content, headers)
    for _ in range(600):
        try:
            return urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.1)
    pytest.fail("nobody listens")


def test_a_port_that_is_taken_is_told_before_models_are_loaded(monkeypatch, capsys):
    with taken_port() as port:
        with pytest.raises(ConfigError, match=f"Can't listen at 127.0.0.1, port {port}"):
            run(nobody, "127.0.0.1", port, Serving())
        monkeypatch.setattr("phatgoose.apps.server.create_app", lambda *_: pytest.fail("loaded"))
        with pytest.raises(SystemExit) as ended:
            main(["serve", "experts", "--port", str(port)])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"Can't listen at 127.0.0.1, port {port}" in told
    assert "--port" in told


def test_without_its_extra_the_command_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("phatgoose.apps.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError, match=r"pip install 'phatgoose\[serve\]'"):
        import phatgoose.apps.server  # noqa: F401


def test_no_more_connections_are_wanted_than_files_may_be_opened(monkeypatch):
    limits = [(1024, 1024)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, value: limits.append(value))
    assert 300 < connections._connections(1000) < 1000
    limits.append((1024, 4096))
    assert connections._connections(1000) == 1000
    assert 1000 < limits[-1][0] < 4096
    limits.append((-1, -1))
    assert connections._connections(1000) == 1000
